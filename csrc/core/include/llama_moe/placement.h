#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llama_moe/context_options.h"
#include "llama_moe/gguf_file.h"
#include "llama_moe/wait.h"

namespace llama_moe {

// What the user asks for; nothing here depends on a model. Mirrored by the Python class ExpertPlacement.
struct PlacementPolicy {
    enum class Kind { gpu, cpu, cpu_first, cpu_last, cpu_layers, rules, fit };

    Kind kind = Kind::fit;
    int count = 0;                                       // cpu_first, cpu_last: layers
    std::vector<int> layers;                             // cpu_layers
    std::vector<std::string> projections = {"up", "gate", "down"};
    std::vector<std::pair<std::string, std::string>> rules;  // (regex, device name), the first match wins
                                                             // fit: those that come before its own
    std::optional<std::uint64_t> vram;                   // fit: bytes to use on each accelerator, of what is free; unset: all of it
    std::optional<std::uint64_t> ram;                    // fit: bytes to use in host memory; unset: what is available
    std::uint64_t reserve = 512ull << 20;                // fit: bytes to leave free on each accelerator
};

struct TensorPlacement {
    std::string name;
    std::string device;
    TensorRole role;
    std::uint64_t bytes;
};

// A GPU that need not be there, to plan for.
struct DeviceSpec {
    std::string name;
    std::uint64_t memory = 0;    // bytes
    std::uint64_t overhead = 0;  // bytes of it that its driver takes
};

// A LoRA adapter: a file, and how much of it is added to the weights.
struct LoraOptions {
    std::string path;
    float scale = 1.0f;
};

struct ModelOptions {
    std::optional<std::vector<std::string>> devices;  // accelerators to use; unset: all; empty: none
    std::vector<DeviceSpec> hypothetical_devices;     // for plans: accelerators besides; with some, unset `devices` are none
    int gpu_layers = -1;                              // layers on accelerators, the output counts as one; -1: all
    std::string host_memory = "mmap";                 // "mmap", "pageable", "pinned" or "locked"
    bool repack = true;                               // let llama.cpp rearrange CPU weights for its vector kernels
    std::string expert_kernels = "auto";              // what computes with weights in host memory: "auto", "llama_moe" or "ggml"
    bool check_tensors = false;                       // look for NaN and invalid blocks while loading
    std::vector<LoraOptions> lora;                    // adapters to load beside the weights
    EngineOptions fit_for;                            // the engine that fit() leaves room for

    void validate() const;
};

// One llama.cpp tensor override: every tensor whose name matches goes to the device.
struct PlacementOverride {
    std::string pattern;
    std::string device;
};

struct ResolvedPlacement {
    std::vector<TensorPlacement> tensors;      // in file order; a tied embedding stands twice, as input and as output
    std::vector<PlacementOverride> overrides;  // what llama.cpp is told
    std::vector<std::string> accelerators;     // in llama.cpp's order
    std::vector<float> tensor_split;           // share of the layers of each accelerator
    int host_layers = 0;                       // layers, and with them their KV cache, in host memory
    std::string summary;                       // for fit: what was chosen
};

// Elements of one layer's KV cache for one token with standard attention: the keys and values of every KV head. An upper
// bound for layers with a compressed cache or a sliding window.
std::uint64_t kv_elements_per_token(const GgufInfo& gguf);

// Decides where every tensor goes, without loading. Throws PlacementError or DoesNotFitError. Called inside a NativeScope.
ResolvedPlacement resolve_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy);

// The same for a file, on a thread of its own: asking a remote device for its memory can block.
std::vector<TensorPlacement> resolve_placement(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy,
                                               const Poll& poll);

}  // namespace llama_moe
