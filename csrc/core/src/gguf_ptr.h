#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "ggml.h"
#include "gguf.h"

namespace llama_moe {

struct GgufDeleter {
    void operator()(gguf_context* context) const { gguf_free(context); }
};
using GgufPtr = std::unique_ptr<gguf_context, GgufDeleter>;

struct GgmlDeleter {
    void operator()(ggml_context* context) const { ggml_free(context); }
};
using GgmlPtr = std::unique_ptr<ggml_context, GgmlDeleter>;

// Bytes of a GGUF file; throws FileNotFoundError, or ModelLoadError for what is none, which llama.cpp would abort on or explain badly.
std::uint64_t check_gguf_file(const std::string& path);

// The header of a file that was checked; with the weights as tensors of `*with_data` when it is given.
GgufPtr open_gguf(const std::string& path, GgmlPtr* with_data = nullptr);

// ggml's name of a type in capitals, as everybody writes them: "Q4_K".
std::string type_name(ggml_type type);

}  // namespace llama_moe
