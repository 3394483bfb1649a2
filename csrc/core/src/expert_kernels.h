#pragma once

#include <string>

#include "accelerators.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// What computes with a load's weights in host memory: our expert backend, which packs them for its kernels, or ggml's CPU backend.
struct KernelChoice {
    bool packed = false;
    std::string reason;  // for "auto"
};

KernelChoice choose_kernels(const ModelOptions& options, const ResolvedPlacement& placement, const Accelerators& accelerators);

// Makes the expert backend known to llama.cpp; it then has a part in every context, and computes where a load chose it.
void register_expert_backend();

}  // namespace llama_moe
