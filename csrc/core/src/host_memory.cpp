#include "host_memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include "llama_moe/error.h"

namespace llama_moe {

std::uint64_t host_bytes(const ResolvedPlacement& placement) {
    std::uint64_t bytes = 0;
    for (const auto& tensor : placement.tensors) {
        bytes += tensor.device == "CPU" ? tensor.bytes : 0;
    }
    return bytes;
}

void check_host_memory(const ModelOptions& options, const ResolvedPlacement& placement, const Accelerators& accelerators, std::uint64_t ram) {
    const std::uint64_t needed = host_bytes(placement);
    if (options.host_memory != "mmap" && needed > ram) {
        throw DoesNotFitError("host_memory='" + options.host_memory + "' needs " + std::to_string(needed) + " bytes of host memory for weights; " +
                                  std::to_string(ram) + " are available; use host_memory='mmap'",
                              {{"CPU", needed, ram}}, {"host_memory='mmap'"});
    }
    if (options.host_memory == "pinned" && !accelerators.offer_pinned_memory()) {
        throw InvalidOptionError("host_memory='pinned' needs an accelerator that offers pinned host memory; use 'mmap' or 'pageable'");
    }
    rlimit limit{};
    if (options.host_memory == "locked" && geteuid() != 0 && getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur < needed) {
        throw DoesNotFitError("host_memory='locked' needs " + std::to_string(needed) + " bytes; the limit on locked memory (ulimit -l) is " +
                                  std::to_string(limit.rlim_cur),
                              {{"CPU", needed, limit.rlim_cur}}, {"host_memory='mmap'"});
    }
}

}  // namespace llama_moe
