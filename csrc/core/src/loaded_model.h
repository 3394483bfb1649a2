#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "accelerators.h"
#include "llama.h"
#include "llama_moe/memory.h"
#include "llama_moe/placement.h"
#include "lora.h"
#include "worker_graphs.h"

namespace llama_moe {

// llama.cpp's model with what must live as long as it does.
struct LoadedModel {
    LoadedModel() = default;
    ~LoadedModel();
    LoadedModel(const LoadedModel&) = delete;
    LoadedModel& operator=(const LoadedModel&) = delete;

    llama_model* model = nullptr;
    const llama_vocab* vocab = nullptr;
    std::uint64_t fingerprint = 0;  // differs between models, and what adapters they have, for saved states

    LoadedLoras loras;

    std::shared_ptr<const Accelerators> accelerators;
    bool dry = false;  // opened to be measured: it holds no weights

    std::list<std::string> patterns;  // llama.cpp keeps pointers into these
    std::vector<llama_model_tensor_buft_override> overrides;
    std::vector<ggml_backend_dev_t> devices;
    std::shared_ptr<const WorkerUse> worker_use;
    std::vector<float> tensor_split;

    int host_layers = 0;
    int layers = 0;
    std::uint64_t kv_elements_per_token = 0;  // of one layer; 0: not known exactly
    bool mapped = false;            // host weights are a mapping of the file
    bool packed = false;            // quantised weights in host memory are packed for our kernels
    std::vector<MemoryRow> memory;  // experts, weights and adapters by device, as allocated
};

struct LoadControl {
    std::atomic<float> progress{0.0f};
    std::atomic<bool> cancelled{false};
};

std::shared_ptr<LoadedModel> load_model(const GgufInfo& gguf, const ModelOptions& options, const ResolvedPlacement& placement,
                                        std::shared_ptr<const Accelerators> accelerators, LoadControl& control);

// The same model without its weights: llama.cpp's dry run, which computes all sizes and reads only headers.
std::shared_ptr<LoadedModel> open_dry(const GgufInfo& gguf, const ModelOptions& options, const ResolvedPlacement& placement,
                                      std::shared_ptr<const Accelerators> accelerators);

// Bytes of experts and of other weights by device, as buffers hold them.
std::vector<MemoryRow> count_memory(const GgufInfo& gguf, const std::vector<TensorPlacement>& placement, const Accelerators& accelerators);

// Bytes of a tensor in a device's memory: llama.cpp pads each one.
std::uint64_t allocated_bytes(const TensorInfo& tensor, ggml_backend_dev_t device);

// Whether a sequence's end can be taken back; a recurrent state cannot.
inline bool takes_back_tokens(const LoadedModel& model) {
    return !llama_model_is_recurrent(model.model) && !llama_model_is_hybrid(model.model);
}

}  // namespace llama_moe
