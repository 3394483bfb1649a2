#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llama_moe/error.h"
#include "llama_moe/memory.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// What a load, and an engine of options.fit_for over it, would take.
struct Plan {
    ResolvedPlacement placement;
    std::vector<int> tensor_layers;         // of each tensor of the placement; -1: of none
    std::vector<std::string> layer_devices;  // of each layer and, last, the output
    std::vector<MemoryRow> rows;             // by device and role, what drivers take included
    std::vector<std::pair<std::string, std::uint64_t>> capacities;  // bytes that each device may use, the host ("CPU") last
    std::vector<Shortfall> shortfalls;       // empty: it fits
};

// Reads headers only, and allocates nothing but what llama.cpp allocates in a dry run as well: rows of outputs, and the states of recurrent
// models. `ram`: bytes of host memory; unset: what is available. Throws what a load would throw for the same options: PlacementError,
// InvalidOptionError, ModelLoadError, and DoesNotFitError for fit() and for host memory that is refused.
Plan make_plan(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy, std::optional<std::uint64_t> ram,
               const Poll& poll = {});

}  // namespace llama_moe
