#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "llama_moe/gguf_file.h"
#include "llama_moe/imatrix.h"
#include "llama_moe/wait.h"

namespace llama_moe {

// Names of the types that a tensor can be quantised to ("Q4_K", "F16", ...), and of the mixes that choose one for every tensor ("Q4_K_M", ...).
std::vector<std::string> tensor_type_names();
std::vector<std::string> mix_names();

struct QuantizeOptions {
    std::string type = "Q4_K_M";  // a mix
    // A tensor type for the weights of one role; "": what the mix gives. A tied embedding is the output too.
    std::string experts;
    std::string attention;
    std::string output;
    std::string embedding;
    // (regex, tensor type): std::regex_search over the tensor's name, the first match wins, before the roles above.
    std::vector<std::pair<std::string, std::string>> rules;
    bool requantize = false;  // tensors that are quantised already, too
    int threads = 0;          // 0: one for each usable core
    std::shared_ptr<const Imatrix> imatrix;

    void validate() const;  // throws InvalidOptionError
};

// One tensor, before and after.
struct QuantizedTensor {
    TensorInfo source;
    int type_id = 0;  // ggml_type
    std::string type;
    std::uint64_t bytes = 0;
    std::string wanted_type;  // what was asked for, when llama.cpp takes another because a row is no multiple of that type's blocks; else ""
    bool needs_imatrix = false;
};

// What quantising a file does, or did.
struct QuantizePlan {
    GgufInfo source;
    int file_type = 0;                     // llama_ftype
    std::vector<QuantizedTensor> tensors;  // in the order of the new file
    std::string header;                    // of the new file, padding included
    std::uint64_t file_bytes = 0;          // of the new file
};

// Reads the source's header and asks llama.cpp what it would do; weights are not read.
QuantizePlan plan_quantization(const std::string& source, const QuantizeOptions& options, const Poll& poll = {});

// Writes `target`, which must not exist; what an exception leaves there is the caller's to remove. When `poll` throws, or `on_progress`
// does, which is called on this thread with the share done, the work stops.
QuantizePlan quantize(const std::string& source, const std::string& target, const QuantizeOptions& options,
                      const std::function<void(float)>& on_progress = {}, const Poll& poll = {});

}  // namespace llama_moe
