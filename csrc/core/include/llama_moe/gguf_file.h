#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace llama_moe {

enum class TensorRole { experts, weights, embedding, output };
const char* role_name(TensorRole role);

struct MetadataArray;
using MetadataValue = std::variant<std::string, std::int64_t, std::uint64_t, double, bool, MetadataArray>;
struct MetadataArray {
    std::vector<MetadataValue> values;
};

struct TensorInfo {
    std::string name;
    int type_id = 0;         // ggml_type
    std::string type;        // "Q4_K", "F32", ...
    std::vector<std::int64_t> shape;  // fastest dimension first, as in GGUF
    std::uint64_t bytes = 0;
    TensorRole role = TensorRole::weights;
    int layer = -1;  // -1: not of a layer
    std::size_t file = 0;      // index in GgufInfo::files
    std::uint64_t offset = 0;  // of its data, from the start of that file
};

// The header of a GGUF file, or of all the files of a split model. Reading it never touches the weights.
struct GgufInfo {
    std::string path;
    std::vector<std::string> files;  // more than one for a split model
    std::string architecture;
    std::map<std::string, MetadataValue> metadata;  // without the tokenizer's vocabulary arrays
    std::vector<TensorInfo> tensors;
    int layer_count = 0;
    int nextn_layer_count = 0;  // of those, multi-token-prediction layers, which are not loaded
    int expert_count = 0;
    int experts_used = 0;
    int vocab_size = 0;  // tokens in the vocabulary; 0 when the file has none
    std::uint64_t parameter_count = 0;
    std::uint64_t size_bytes = 0;  // of all tensors

    // The value of "<architecture>.<key>" as an integer; `otherwise` when absent. For a per-layer array, its largest entry.
    std::int64_t architecture_integer(const std::string& key, std::int64_t otherwise) const;
};

// Throws FileNotFoundError, or ModelLoadError for a file that is not GGUF, is truncated or is corrupted.
GgufInfo read_gguf(const std::string& path);

// True for the tensors of routed experts: `ffn_{up,down,gate,gate_up}_{exps,chexps}`, weights, biases and scales.
bool is_expert_tensor(const std::string& name);

}  // namespace llama_moe
