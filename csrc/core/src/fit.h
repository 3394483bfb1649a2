#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "accelerators.h"
#include "llama_moe/error.h"
#include "llama_moe/memory.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// Bytes that may be used of each accelerator and, last, of the host ("CPU").
struct Capacity {
    std::string device;
    std::uint64_t bytes;
    bool shares_host;  // what it holds counts as host memory as well
};
std::vector<Capacity> capacities(const Accelerators& accelerators, const PlacementPolicy& policy);

// The devices that are too small for what the rows say, with `reserve` bytes left free on each accelerator.
std::vector<Shortfall> shortfalls(const std::vector<MemoryRow>& rows, const std::vector<Capacity>& capacities, std::uint64_t reserve);

// "RPC0 needs 9.10 GiB and has 8.00 GiB (1.10 GiB short); CPU ..."
std::string describe(const std::vector<Shortfall>& shortfalls);

// The memory report of a placement; dry_run() of it.
using Measure = std::function<std::vector<MemoryRow>(const ResolvedPlacement&)>;

// The placement that leaves the fewest bytes of experts to the CPU and fits, for a model with the given rules before it. Fewer bytes read
// by the slowest memory for each token is what makes a placement quicker. Throws DoesNotFitError, which says what would help.
// `cancelled` ends the search with CancelledError.
ResolvedPlacement fit_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                const std::shared_ptr<const Accelerators>& accelerators, const std::atomic<bool>& cancelled);

// The search itself, whatever measures the placements.
ResolvedPlacement fit_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                const Accelerators& accelerators, const Measure& measure);

}  // namespace llama_moe
