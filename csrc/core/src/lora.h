#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama.h"
#include "llama_moe/memory.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// The header of a LoRA adapter that was found to fit a model.
struct LoraFile {
    struct Pair {
        std::string weight;  // the model's tensor that the product B A is added to
        TensorInfo a;
        TensorInfo b;
    };

    std::string path;
    float scale = 1.0f;
    float alpha = 0.0f;  // 0: the product is not scaled by alpha / rank
    std::vector<Pair> pairs;
};

// Reads the adapters' headers; those with a scale of 0 are checked and left out. Throws FileNotFoundError, or ModelLoadError for what is no
// adapter or is one of another model: llama.cpp checks less, and would abort in a decode.
std::vector<LoraFile> read_loras(const GgufInfo& model, const std::vector<LoraOptions>& options);

// The adapters of a llama.cpp model, which frees them.
struct LoadedLoras {
    std::vector<llama_adapter_lora*> adapters;
    std::vector<float> scales;
    std::vector<MemoryRow> memory;  // as "adapters", by device

    // Loads one, beside the weights that it changes.
    void load(llama_model* model, const LoraFile& file);
    // The same without reading or allocating its tensors, for a model that was opened dry.
    void open_dry(llama_model* model, const LoraFile& file);

   private:
    void add(llama_adapter_lora* adapter, float scale);
};

// Differs between files of different content, and between scales.
std::uint64_t fingerprint(const LoraFile& file);

// Makes a context compute with the adapters, and reserves its compute buffers again, which grow by that.
void use_loras(llama_context* context, const LoadedLoras& loras);

}  // namespace llama_moe
