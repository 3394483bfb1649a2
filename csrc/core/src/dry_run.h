#pragma once

#include <memory>
#include <vector>

#include "accelerators.h"
#include "llama_moe/memory.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// The memory report that an engine of options.fit_for over this placement would give, by llama.cpp's dry run: of the file only
// headers are read, and no weights, cache or compute buffers are allocated. What drivers take is there too, as "overhead". Called inside a
// NativeScope.
std::vector<MemoryRow> dry_run(const GgufInfo& gguf, const ModelOptions& options, const ResolvedPlacement& placement,
                               const std::shared_ptr<const Accelerators>& accelerators);

}  // namespace llama_moe
