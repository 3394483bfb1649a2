#include "gguf_builder.h"

#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace test {

GgufBuilder::GgufBuilder() : gguf_(gguf_init_empty()) {
    constexpr std::size_t kMaxTensors = 1024;
    ggml_.reset(ggml_init({kMaxTensors * ggml_tensor_overhead(), nullptr, /*no_alloc=*/true}));
}

GgufBuilder& GgufBuilder::set(const std::string& key, const std::string& value) {
    gguf_set_val_str(get(), key.c_str(), value.c_str());
    return *this;
}

GgufBuilder& GgufBuilder::set(const std::string& key, std::uint32_t value) {
    gguf_set_val_u32(get(), key.c_str(), value);
    return *this;
}

GgufBuilder& GgufBuilder::set(const std::string& key, float value) {
    gguf_set_val_f32(get(), key.c_str(), value);
    return *this;
}

GgufBuilder& GgufBuilder::set(const std::string& key, bool value) {
    gguf_set_val_bool(get(), key.c_str(), value);
    return *this;
}

GgufBuilder& GgufBuilder::set(const std::string& key, const std::vector<std::string>& values) {
    std::vector<const char*> pointers;
    for (const auto& value : values) {
        pointers.push_back(value.c_str());
    }
    gguf_set_arr_str(get(), key.c_str(), pointers.data(), pointers.size());
    return *this;
}

GgufBuilder& GgufBuilder::set(const std::string& key, const std::vector<std::uint32_t>& values) {
    gguf_set_arr_data(get(), key.c_str(), GGUF_TYPE_UINT32, values.data(), values.size());
    return *this;
}

GgufBuilder& GgufBuilder::set(const std::string& key, const std::vector<float>& values) {
    gguf_set_arr_data(get(), key.c_str(), GGUF_TYPE_FLOAT32, values.data(), values.size());
    return *this;
}

GgufBuilder& GgufBuilder::set(const std::string& key, const std::vector<std::int32_t>& values) {
    gguf_set_arr_data(get(), key.c_str(), GGUF_TYPE_INT32, values.data(), values.size());
    return *this;
}

GgufBuilder& GgufBuilder::tensor(const std::string& name, const std::vector<std::int64_t>& shape, ggml_type type) {
    ggml_tensor* meta = ggml_new_tensor(ggml_.get(), type, static_cast<int>(shape.size()), shape.data());
    ggml_set_name(meta, name.c_str());
    gguf_add_tensor(get(), meta);
    values_.emplace_back();
    return *this;
}

GgufBuilder& GgufBuilder::tensor(const std::string& name, const std::vector<std::int64_t>& shape, std::vector<float> values) {
    tensor(name, shape);
    values_.back() = std::move(values);
    return *this;
}

std::string GgufBuilder::header() const {
    std::string bytes(gguf_get_meta_size(get()), '\0');
    gguf_get_meta_data(get(), bytes.data());
    return bytes;
}

void GgufBuilder::write(const std::string& path) const {
    const std::string meta = header();
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(meta.data(), static_cast<std::streamsize>(meta.size()));
    std::size_t size = meta.size();
    for (std::size_t i = 0; i < values_.size(); i++) {
        const auto index = static_cast<std::int64_t>(i);
        const std::size_t offset = meta.size() + gguf_get_tensor_offset(get(), index);
        const std::size_t bytes = gguf_get_tensor_size(get(), index);
        size = offset + GGML_PAD(bytes, gguf_get_alignment(get()));
        if (values_[i].empty()) {
            continue;
        }
        if (values_[i].size() * sizeof(float) != bytes) {
            throw std::logic_error("a tensor's values and its shape differ");
        }
        file.seekp(static_cast<std::streamoff>(offset));
        file.write(reinterpret_cast<const char*>(values_[i].data()), static_cast<std::streamsize>(bytes));
    }
    file.close();
    if (!file) {
        throw std::runtime_error("cannot write " + path);
    }
    std::filesystem::resize_file(path, size);
}

}  // namespace test
