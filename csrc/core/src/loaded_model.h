#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "llama.h"
#include "llama_moe/memory.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// llama.cpp's model with what must live as long as it does.
struct LoadedModel {
    LoadedModel() = default;
    ~LoadedModel();
    LoadedModel(const LoadedModel&) = delete;
    LoadedModel& operator=(const LoadedModel&) = delete;

    llama_model* model = nullptr;
    const llama_vocab* vocab = nullptr;
    std::uint64_t fingerprint = 0;  // differs between models, for saved states

    std::list<std::string> patterns;  // llama.cpp keeps pointers into these
    std::vector<llama_model_tensor_buft_override> overrides;
    std::vector<ggml_backend_dev_t> devices;
    std::vector<float> tensor_split;

    int host_layers = 0;
    int layers = 0;
    std::uint64_t kv_elements_per_token = 0;  // of one layer; 0: not known exactly
    bool mapped = false;            // host weights are a mapping of the file
    std::vector<MemoryRow> memory;  // experts and weights by device, as allocated
};

// Whether a sequence's end can be taken back; a recurrent state cannot.
inline bool takes_back_tokens(const LoadedModel& model) {
    return !llama_model_is_recurrent(model.model) && !llama_model_is_hybrid(model.model);
}

}  // namespace llama_moe
