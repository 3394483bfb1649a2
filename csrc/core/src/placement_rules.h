#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "accelerators.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// Where llama.cpp puts each layer and the output by itself (llama-model.cpp, load_tensors).
class LayerDevices {
   public:
    // `split`: the share of the layers of each accelerator.
    LayerDevices(const GgufInfo& gguf, const ModelOptions& options, const Accelerators& accelerators, const std::vector<float>& split);

    // The name of a layer's device; "CPU" for host memory.
    std::string layer(int index) const;
    std::string output() const { return layer(output_); }
    // Layers on accelerators, the output counting as one.
    int count() const { return count_; }

   private:
    std::vector<std::string> accelerators_;
    std::vector<float> ends_;
    int first_ = 0;
    int count_ = 0;
    int output_ = 0;
};

// The regex of the expert tensors of some projections ("up", "gate", "down"), in the layers given; no layers: in all.
std::string expert_pattern(const std::vector<std::string>& projections, const std::vector<int>& layers);

// What a policy that needs no measuring tells llama.cpp; of fit(), the rules that come before its own. Each matches something.
std::vector<PlacementOverride> policy_overrides(const GgufInfo& gguf, const PlacementPolicy& policy, const Accelerators& accelerators);

// The split that llama.cpp would choose: by free memory.
std::vector<float> default_split(const Accelerators& accelerators);

ResolvedPlacement place_tensors(const GgufInfo& gguf, const ModelOptions& options, const Accelerators& accelerators,
                                std::vector<PlacementOverride> overrides, std::vector<float> tensor_split);

// `cancelled` ends the search of fit() with CancelledError.
ResolvedPlacement resolve_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                    const std::shared_ptr<const Accelerators>& accelerators, const std::atomic<bool>& cancelled);

// For each tensor, whether one of the overrides matches its name.
std::vector<bool> matched_tensors(const GgufInfo& gguf, const std::vector<PlacementOverride>& overrides);

}  // namespace llama_moe
