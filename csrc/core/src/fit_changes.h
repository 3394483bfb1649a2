#pragma once

#include <functional>
#include <string>
#include <vector>

#include "llama_moe/error.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// Finds a placement for other options, or throws DoesNotFitError.
using FitWith = std::function<ResolvedPlacement(const ModelOptions&, const PlacementPolicy&)>;

// For what did not fit: the nearest value of each option with which it would, all others left alone: "context_size=2048". Empty when none
// helps alone.
std::vector<std::string> changes_that_fit(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                          const std::vector<Shortfall>& missing, const FitWith& fit);

}  // namespace llama_moe
