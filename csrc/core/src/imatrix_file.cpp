#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "ggml.h"
#include "gguf_ptr.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/imatrix.h"
#include "native_thread.h"

// The format is that of llama.cpp's llama-imatrix (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp): for the weights NAME a tensor
// NAME.in_sum2 [columns, matrices] and a tensor NAME.counts [1, matrices], both F32.

namespace llama_moe {
namespace {

constexpr const char* kSums = ".in_sum2";
constexpr const char* kCounts = ".counts";
constexpr const char* kDatasets = "imatrix.datasets";
constexpr const char* kChunkCount = "imatrix.chunk_count";
constexpr const char* kChunkSize = "imatrix.chunk_size";

[[noreturn]] void refuse(const std::string& path, const std::string& reason) {
    throw ModelLoadError("'" + path + "' is not an importance matrix: " + reason);
}

bool remove_suffix(std::string& name, const char* suffix) {
    const std::size_t size = std::strlen(suffix);
    if (name.size() <= size || name.compare(name.size() - size, size, suffix) != 0) {
        return false;
    }
    name.resize(name.size() - size);
    return true;
}

std::vector<float> read_values(const ggml_tensor* tensor, const std::string& path) {
    if (tensor->type != GGML_TYPE_F32) {
        refuse(path, std::string("its tensor '") + tensor->name + "' is " + type_name(tensor->type) + "; F32 is expected");
    }
    const auto* values = static_cast<const float*>(tensor->data);
    std::vector<float> copy(values, values + ggml_nelements(tensor));
    if (!std::all_of(copy.begin(), copy.end(), [](float value) { return std::isfinite(value) && value >= 0.0f; })) {
        refuse(path, std::string("its tensor '") + tensor->name + "' has values that are negative or not finite");
    }
    return copy;
}

std::uint32_t read_number(const gguf_context* gguf, const char* key, const std::string& path) {
    const auto found = gguf_find_key(gguf, key);
    if (found < 0 || gguf_get_kv_type(gguf, found) != GGUF_TYPE_UINT32) {
        refuse(path, std::string("it has no ") + key);
    }
    return gguf_get_val_u32(gguf, found);
}

std::vector<std::string> read_datasets(const gguf_context* gguf, const std::string& path) {
    const auto found = gguf_find_key(gguf, kDatasets);
    if (found < 0 || gguf_get_kv_type(gguf, found) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, found) != GGUF_TYPE_STRING) {
        refuse(path, std::string("it has no ") + kDatasets);
    }
    std::vector<std::string> datasets;
    for (std::size_t i = 0; i < gguf_get_arr_n(gguf, found); i++) {
        datasets.emplace_back(gguf_get_arr_str(gguf, found, i));
    }
    return datasets;
}

Imatrix read(const std::string& path) {
    check_gguf_file(path);
    GgmlPtr tensors;
    const GgufPtr gguf = open_gguf(path, &tensors);
    Imatrix imatrix;
    imatrix.path = path;
    imatrix.datasets = read_datasets(gguf.get(), path);
    imatrix.chunk_count = read_number(gguf.get(), kChunkCount, path);
    imatrix.chunk_size = read_number(gguf.get(), kChunkSize, path);
    for (auto* tensor = ggml_get_first_tensor(tensors.get()); tensor != nullptr; tensor = ggml_get_next_tensor(tensors.get(), tensor)) {
        std::string name = tensor->name;
        if (remove_suffix(name, kSums)) {
            imatrix.entries[name].sums = read_values(tensor, path);
        } else if (remove_suffix(name, kCounts)) {
            imatrix.entries[name].counts = read_values(tensor, path);
        }
    }
    for (const auto& [name, entry] : imatrix.entries) {
        if (entry.sums.empty() || entry.counts.empty() || entry.sums.size() % entry.counts.size() != 0) {
            refuse(path, "it has " + std::to_string(entry.sums.size()) + " sums and " + std::to_string(entry.counts.size()) + " counts for '" + name + "'");
        }
    }
    if (imatrix.entries.empty()) {
        refuse(path, "it has no entries");
    }
    return imatrix;
}

}  // namespace

std::vector<float> Imatrix::weights(const std::string& name) const {
    const auto found = entries.find(name);
    if (found == entries.end()) {
        return {};
    }
    const Entry& entry = found->second;
    const std::size_t columns = entry.sums.size() / entry.counts.size();
    std::vector<float> weights(entry.sums.size());
    for (std::size_t i = 0; i < weights.size(); i++) {
        const float count = entry.counts[i / columns];
        weights[i] = count > 0.0f ? entry.sums[i] / count : 1.0f;
    }
    return weights;
}

Imatrix read_imatrix(const std::string& path) {
    start_backend();
    const NativeScope scope;
    try {
        return read(path);
    } catch (const NativeAbort& abort) {
        refuse(path, abort.what());
    }
}

void write_imatrix(const Imatrix& imatrix, const std::string& path) {
    const NativeScope scope;
    const GgufPtr gguf(gguf_init_empty());
    std::vector<const char*> datasets;
    for (const auto& dataset : imatrix.datasets) {
        datasets.push_back(dataset.c_str());
    }
    gguf_set_val_str(gguf.get(), "general.type", "imatrix");
    gguf_set_arr_str(gguf.get(), kDatasets, datasets.data(), datasets.size());
    gguf_set_val_u32(gguf.get(), kChunkCount, imatrix.chunk_count);
    gguf_set_val_u32(gguf.get(), kChunkSize, imatrix.chunk_size);

    std::size_t bytes = 0;
    for (const auto& [name, entry] : imatrix.entries) {
        bytes += (entry.sums.size() + entry.counts.size()) * sizeof(float) + 2 * (ggml_tensor_overhead() + GGML_MEM_ALIGN);
    }
    const GgmlPtr tensors(ggml_init({bytes, nullptr, /*no_alloc=*/false}));
    const auto add = [&](const std::string& name, const std::vector<float>& values, std::int64_t columns, std::int64_t rows) {
        ggml_tensor* tensor = ggml_new_tensor_2d(tensors.get(), GGML_TYPE_F32, columns, rows);
        ggml_set_name(tensor, name.c_str());
        std::copy(values.begin(), values.end(), static_cast<float*>(tensor->data));
        gguf_add_tensor(gguf.get(), tensor);
    };
    for (const auto& [name, entry] : imatrix.entries) {
        const auto matrices = static_cast<std::int64_t>(entry.counts.size());
        add(name + kSums, entry.sums, static_cast<std::int64_t>(entry.sums.size()) / matrices, matrices);
        add(name + kCounts, entry.counts, 1, matrices);
    }
    if (!gguf_write_to_file(gguf.get(), path.c_str(), /*only_meta=*/false)) {
        throw FileError(errno, "cannot write '" + path + "': " + std::strerror(errno));
    }
}

}  // namespace llama_moe
