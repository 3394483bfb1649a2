#include "dry_run.h"

#include "llama_moe/log.h"
#include "loaded_model.h"
#include "native_context.h"
#include "native_decoder.h"

namespace llama_moe {

std::vector<MemoryRow> dry_run(const GgufInfo& gguf, const ModelOptions& options, const ResolvedPlacement& placement,
                               const std::shared_ptr<const Accelerators>& accelerators) {
    const QuietLog quiet;
    const auto model = open_dry(gguf, options, placement, accelerators);
    const NativeContext context(model, options.fit_for, engine_use(*model, options.fit_for), [] { return false; });
    auto rows = context.memory_rows();
    for (const auto& entry : accelerators->entries()) {
        add_bytes(rows, entry.name, "overhead", entry.overhead);
    }
    return rows;
}

}  // namespace llama_moe
