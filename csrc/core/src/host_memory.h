#pragma once

#include "accelerators.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// Bytes of weights in host memory.
std::uint64_t host_bytes(const ResolvedPlacement& placement);

// Refuses a way of holding weights in host memory that would be a warning, a slower way than was asked for, or the kernel killing the
// process. `ram`: bytes that may be used. Throws DoesNotFitError or InvalidOptionError.
void check_host_memory(const ModelOptions& options, const ResolvedPlacement& placement, const Accelerators& accelerators, std::uint64_t ram);

}  // namespace llama_moe
