#include "llama_moe/gguf_file.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <regex>

#include "ggml.h"
#include "gguf.h"
#include "gguf_ptr.h"
#include "llama.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

namespace fs = std::filesystem;

// A model's vocabulary is large and of no use as metadata.
constexpr std::size_t kMaxMetadataArray = 1024;

// What llama.cpp has arrays for (llama-hparams.h).
constexpr int kMaxLayers = 512;
constexpr int kMaxExperts = 1024;

template <typename T>
MetadataValue element(gguf_type type, const T* data, std::size_t i) {
    const auto* bytes = static_cast<const std::uint8_t*>(static_cast<const void*>(data));
    const auto read = [&](auto value) {
        std::memcpy(&value, bytes + i * sizeof(value), sizeof(value));
        return value;
    };
    switch (type) {
        case GGUF_TYPE_UINT8: return std::uint64_t{read(std::uint8_t{})};
        case GGUF_TYPE_INT8: return std::int64_t{read(std::int8_t{})};
        case GGUF_TYPE_UINT16: return std::uint64_t{read(std::uint16_t{})};
        case GGUF_TYPE_INT16: return std::int64_t{read(std::int16_t{})};
        case GGUF_TYPE_UINT32: return std::uint64_t{read(std::uint32_t{})};
        case GGUF_TYPE_INT32: return std::int64_t{read(std::int32_t{})};
        case GGUF_TYPE_UINT64: return read(std::uint64_t{});
        case GGUF_TYPE_INT64: return read(std::int64_t{});
        case GGUF_TYPE_FLOAT32: return double{read(float{})};
        case GGUF_TYPE_FLOAT64: return read(double{});
        default: return read(std::uint8_t{}) != 0;
    }
}

MetadataValue read_value(const gguf_context* gguf, std::int64_t key) {
    const gguf_type type = gguf_get_kv_type(gguf, key);
    if (type == GGUF_TYPE_STRING) {
        return std::string(gguf_get_val_str(gguf, key));
    }
    if (type != GGUF_TYPE_ARRAY) {
        return element(type, gguf_get_val_data(gguf, key), 0);
    }
    MetadataArray array;
    const gguf_type element_type = gguf_get_arr_type(gguf, key);
    for (std::size_t i = 0; i < gguf_get_arr_n(gguf, key); i++) {
        if (element_type == GGUF_TYPE_STRING) {
            array.values.emplace_back(std::string(gguf_get_arr_str(gguf, key, i)));
        } else {
            array.values.push_back(element(element_type, gguf_get_arr_data(gguf, key), i));
        }
    }
    return array;
}

bool is_vocabulary(const gguf_context* gguf, std::int64_t key) {
    return gguf_get_kv_type(gguf, key) == GGUF_TYPE_ARRAY && gguf_get_arr_n(gguf, key) > kMaxMetadataArray;
}

int vocabulary_size(const gguf_context* gguf) {
    const std::int64_t key = gguf_find_key(gguf, "tokenizer.ggml.tokens");
    return key < 0 || gguf_get_kv_type(gguf, key) != GGUF_TYPE_ARRAY ? 0 : static_cast<int>(gguf_get_arr_n(gguf, key));
}

// As an integer; a per-layer array stands for its largest entry.
std::optional<std::int64_t> to_integer(const MetadataValue& value) {
    if (const auto* number = std::get_if<std::uint64_t>(&value)) {
        return static_cast<std::int64_t>(*number);
    }
    if (const auto* number = std::get_if<std::int64_t>(&value)) {
        return *number;
    }
    if (const auto* array = std::get_if<MetadataArray>(&value)) {
        std::optional<std::int64_t> largest;
        for (const auto& entry : array->values) {
            const auto number = to_integer(entry);
            if (number && (!largest || *number > *largest)) {
                largest = number;
            }
        }
        return largest;
    }
    return std::nullopt;
}

TensorRole tensor_role(const std::string& name) {
    if (is_expert_tensor(name)) {
        return TensorRole::experts;
    }
    for (const char* input : {"token_embd.", "per_layer_token_embd.", "position_embd.", "token_types."}) {
        if (name.rfind(input, 0) == 0) {
            return TensorRole::embedding;
        }
    }
    return name.rfind("output.", 0) == 0 ? TensorRole::output : TensorRole::weights;
}

int tensor_layer(const std::string& name) {
    if (name.rfind("blk.", 0) != 0) {
        return -1;
    }
    const std::size_t end = name.find('.', 4);
    const std::string number = name.substr(4, end == std::string::npos ? end : end - 4);
    const bool valid = !number.empty() && number.size() < 7 && number.find_first_not_of("0123456789") == std::string::npos;
    return valid ? std::stoi(number) : -1;
}

void add_tensors(GgufInfo& info, const gguf_context* gguf, const std::string& path, std::uint64_t file_size,
                 std::size_t file) {
    const std::uint64_t data_start = gguf_get_data_offset(gguf);
    for (std::int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        TensorInfo tensor;
        tensor.name = gguf_get_tensor_name(gguf, i);
        const ggml_type type = gguf_get_tensor_type(gguf, i);
        tensor.type_id = type;
        tensor.type = type_name(type);
        tensor.bytes = gguf_get_tensor_size(gguf, i);
        tensor.role = tensor_role(tensor.name);
        tensor.layer = tensor_layer(tensor.name);
        const std::int64_t* shape = gguf_get_tensor_ne(gguf, i);
        std::size_t dimensions = GGML_MAX_DIMS;
        while (dimensions > 1 && shape[dimensions - 1] == 1) {
            dimensions--;
        }
        tensor.shape.assign(shape, shape + dimensions);
        std::uint64_t elements = 1;
        for (const auto extent : tensor.shape) {
            elements *= static_cast<std::uint64_t>(extent);
        }
        tensor.file = file;
        tensor.offset = data_start + gguf_get_tensor_offset(gguf, i);
        const std::uint64_t end = tensor.offset + tensor.bytes;
        if (end > file_size) {
            throw ModelLoadError("'" + path + "' is truncated: tensor '" + tensor.name + "' ends at byte " + std::to_string(end) +
                                 ", the file has " + std::to_string(file_size));
        }
        info.parameter_count += elements;
        info.size_bytes += tensor.bytes;
        info.tensors.push_back(std::move(tensor));
    }
}

std::int64_t split_number(const GgufInfo& info, const char* key, std::int64_t otherwise) {
    const auto found = info.metadata.find(key);
    return found == info.metadata.end() ? otherwise : to_integer(found->second).value_or(otherwise);
}

// ", the second of 3 files"
std::string part_text(const GgufInfo& info) {
    const auto number = split_number(info, "split.no", -1);
    return number < 0 ? "" : ", file " + std::to_string(number + 1) + " of " + std::to_string(split_number(info, "split.count", 1));
}

// A file that was renamed, or is of another model, would be read in another one's place.
void check_part(const GgufInfo& part, std::size_t index, const std::vector<std::string>& files) {
    const auto number = split_number(part, "split.no", -1);
    const auto count = split_number(part, "split.count", 0);
    if (number != static_cast<std::int64_t>(index) || count != static_cast<std::int64_t>(files.size())) {
        throw ModelLoadError("'" + part.path + "' is not file " + std::to_string(index + 1) + " of " + std::to_string(files.size()) + " of the split model '" +
                             files.front() + "': " +
                             (count < 1 ? "it is no part of a split model" : "its header says that it is file " + std::to_string(number + 1) + " of " + std::to_string(count)) +
                             "; was it renamed?");
    }
}

// Every tensor once, and as many as the first file says.
void check_split_tensors(const GgufInfo& info) {
    std::map<std::string, std::size_t> file_of;
    for (const auto& tensor : info.tensors) {
        const auto [known, is_new] = file_of.emplace(tensor.name, tensor.file);
        if (!is_new) {
            throw ModelLoadError("'" + info.files[tensor.file] + "' has a tensor '" + tensor.name + "' that '" + info.files[known->second] +
                                 "' has too; they are not of one split model");
        }
    }
    const auto expected = split_number(info, "split.tensors.count", static_cast<std::int64_t>(info.tensors.size()));
    if (expected != static_cast<std::int64_t>(info.tensors.size())) {
        throw ModelLoadError("the split model '" + info.path + "' has " + std::to_string(info.tensors.size()) + " tensors in its " +
                             std::to_string(info.files.size()) + " files; its header says that there are " + std::to_string(expected));
    }
}

std::vector<std::string> split_files(const std::string& path, const GgufInfo& info) {
    const auto found = info.metadata.find("split.count");
    const std::int64_t count = found == info.metadata.end() ? 1 : to_integer(found->second).value_or(1);
    if (count <= 1) {
        return {path};
    }
    std::vector<char> buffer(path.size() + 64);
    if (count > 9999 || llama_split_prefix(buffer.data(), buffer.size(), path.c_str(), 0, static_cast<int>(count)) <= 0) {
        const std::string digits = std::to_string(count);
        throw ModelLoadError("'" + path + "' is part of a split model" + part_text(info) + "; give its first file, named like model-00001-of-" +
                             std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits + ".gguf, with the others beside it");
    }
    const std::string prefix(buffer.data());
    std::vector<std::string> files;
    for (int i = 0; i < count; i++) {
        llama_split_path(buffer.data(), buffer.size(), prefix.c_str(), i, static_cast<int>(count));
        files.emplace_back(buffer.data());
    }
    return files;
}

// A count of the architecture, 0 when absent. `most` is what llama.cpp has room for; it aborts on more.
int architecture_count(const GgufInfo& info, const char* key, int most) {
    const std::int64_t count = info.architecture_integer(key, 0);
    if (count < 0 || count > most) {
        throw ModelLoadError("'" + info.path + "' has a corrupted header: " + info.architecture + "." + key + " is " + std::to_string(count) +
                             "; it must be from 0 to " + std::to_string(most));
    }
    return static_cast<int>(count);
}

// llama.cpp divides by the number of heads. Models without attention have 0 of them.
void check_heads(const GgufInfo& info) {
    const auto is_attention = [](const TensorInfo& tensor) { return tensor.name.find(".attn_q") != std::string::npos; };
    const bool has_attention = std::any_of(info.tensors.begin(), info.tensors.end(), is_attention);
    if (has_attention && info.architecture_integer("attention.head_count", 1) == 0) {
        throw ModelLoadError("'" + info.path + "' has a corrupted header: " + info.architecture +
                             ".attention.head_count is 0; it must be 1 or more");
    }
}

void read_metadata(GgufInfo& info, const gguf_context* gguf) {
    for (std::int64_t key = 0; key < gguf_get_n_kv(gguf); key++) {
        if (!is_vocabulary(gguf, key)) {
            info.metadata.emplace(gguf_get_key(gguf, key), read_value(gguf, key));
        }
    }
}

// The files of a split model but the first.
void read_parts(GgufInfo& info) {
    for (std::size_t i = 1; i < info.files.size(); i++) {
        GgufInfo part;
        part.path = info.files[i];
        std::uint64_t size = 0;
        try {
            size = check_gguf_file(part.path);
        } catch (const FileNotFoundError& error) {
            throw FileNotFoundError(std::string(error.what()) + ", which is file " + std::to_string(i + 1) + " of the " +
                                    std::to_string(info.files.size()) + " of the split model '" + info.path + "'");
        }
        const GgufPtr gguf = open_gguf(part.path);
        read_metadata(part, gguf.get());
        check_part(part, i, info.files);
        add_tensors(info, gguf.get(), part.path, size, i);
    }
}

GgufInfo read_header(const std::string& path) {
    GgufInfo info;
    info.path = path;
    const std::uint64_t size = check_gguf_file(path);
    {
        const GgufPtr gguf = open_gguf(path);
        read_metadata(info, gguf.get());
        info.vocab_size = vocabulary_size(gguf.get());
        add_tensors(info, gguf.get(), path, size, 0);
    }
    info.files = split_files(path, info);
    if (info.files.size() > 1) {
        check_part(info, 0, info.files);
        read_parts(info);
        check_split_tensors(info);
    }
    const auto architecture = info.metadata.find("general.architecture");
    const auto* name = architecture == info.metadata.end() ? nullptr : std::get_if<std::string>(&architecture->second);
    if (name == nullptr) {
        throw ModelLoadError("'" + path + "' has no general.architecture; it is not a model");
    }
    info.architecture = *name;
    info.layer_count = architecture_count(info, "block_count", kMaxLayers);
    info.nextn_layer_count = architecture_count(info, "nextn_predict_layers", info.layer_count);
    info.expert_count = architecture_count(info, "expert_count", kMaxExperts);
    info.experts_used = architecture_count(info, "expert_used_count", kMaxExperts);
    check_heads(info);
    return info;
}

}  // namespace

std::uint64_t check_gguf_file(const std::string& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (!fs::exists(status)) {
        throw FileNotFoundError("no such file: '" + path + "'");
    }
    if (fs::is_directory(status)) {
        throw ModelLoadError("'" + path + "' is a directory; a GGUF file is needed");
    }
    if (!fs::is_regular_file(status)) {  // opening a pipe would wait for a writer
        throw ModelLoadError("'" + path + "' is not a regular file; a GGUF file is needed");
    }
    const std::uint64_t size = fs::file_size(path, error);
    std::ifstream file(path, std::ios::binary);
    char magic[4] = {};
    if (error || !file || (size >= 4 && !file.read(magic, 4))) {
        throw ModelLoadError("cannot read '" + path + "': " + std::strerror(errno));
    }
    if (std::memcmp(magic, "GGUF", 4) != 0) {
        throw ModelLoadError("'" + path + "' is not a GGUF file: it does not start with the magic \"GGUF\"");
    }
    return size;
}

GgufPtr open_gguf(const std::string& path, GgmlPtr* with_data) {
    ErrorLog errors;
    ggml_context* tensors = nullptr;
    gguf_init_params params{/*no_alloc=*/with_data == nullptr, /*ctx=*/&tensors};
    GgufPtr gguf(gguf_init_from_file(path.c_str(), params));
    GgmlPtr owner(tensors);
    if (!gguf) {
        throw ModelLoadError("'" + path + "' has a corrupted or truncated GGUF header: " + errors.text("unknown reason"));
    }
    if (with_data != nullptr) {
        *with_data = std::move(owner);
    }
    return gguf;
}

std::string type_name(ggml_type type) {
    std::string name = ggml_type_name(type);
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
    return name;
}

const char* role_name(TensorRole role) {
    switch (role) {
        case TensorRole::experts: return "experts";
        case TensorRole::embedding: return "embedding";
        case TensorRole::output: return "output";
        default: return "weights";
    }
}

bool is_expert_tensor(const std::string& name) {
    // What llama.cpp's --cpu-moe matches (common.h, LLM_FFN_EXPS_REGEX), read by hand: a regex per tensor is slow.
    for (const char* projection : {".ffn_up_", ".ffn_down_", ".ffn_gate_", ".ffn_gate_up_"}) {
        const std::size_t at = name.find(projection);
        if (at == std::string::npos) {
            continue;
        }
        const std::string rest = name.substr(at + std::strlen(projection));
        if (rest.rfind("exps", 0) == 0 || rest.rfind("chexps", 0) == 0) {
            return true;
        }
    }
    return false;
}

std::int64_t GgufInfo::architecture_integer(const std::string& key, std::int64_t otherwise) const {
    const auto found = metadata.find(architecture + "." + key);
    return found == metadata.end() ? otherwise : to_integer(found->second).value_or(otherwise);
}

GgufInfo read_gguf(const std::string& path) {
    start_backend();
    const NativeScope scope;
    try {
        return read_header(path);
    } catch (const NativeAbort& abort) {
        throw ModelLoadError("'" + path + "' has a corrupted GGUF header: " + abort.what());
    }
}

}  // namespace llama_moe
