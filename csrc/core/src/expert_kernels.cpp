#include "expert_kernels.h"

#include <mutex>

#include "host_memory.h"
#include "llama_moe/expert_backend.h"
#include "machine.h"

namespace llama_moe {
namespace {

// Of the memory that is available; the rest is for the cache and for what is computed.
constexpr double kShareForWeights = 0.9;

KernelChoice choose(const ModelOptions& options, const ResolvedPlacement& placement, const Accelerators& accelerators) {
    if (!options.repack) {
        return {false, "repack=False leaves weights as the file has them"};
    }
    if (options.host_memory == "pinned" || options.host_memory == "locked") {
        return {false, "host_memory='" + options.host_memory + "' keeps weights as the file has them"};
    }
    if (experts::kernel_name() == "portable") {
        return {false, "llama_moe's are not made for this processor"};
    }
    if (accelerators.offer_pinned_memory()) {
        return {false, "for long prompts llama.cpp copies weights from host memory to the GPU, which needs them as the file has them"};
    }
    if (static_cast<double>(host_bytes(placement)) > kShareForWeights * static_cast<double>(available_ram())) {
        return {false, "a packed copy of the weights does not fit into the memory that is available"};
    }
    return {true, "they are made for this processor (" + experts::kernel_name() + ")"};
}

}  // namespace

KernelChoice choose_kernels(const ModelOptions& options, const ResolvedPlacement& placement, const Accelerators& accelerators) {
    if (options.expert_kernels == "auto") {
        return choose(options, placement, accelerators);
    }
    return {options.expert_kernels == "llama_moe", ""};
}

void register_expert_backend() {
    static std::once_flag once;
    std::call_once(once, [] { ggml_backend_register(experts::expert_registry()); });
}

}  // namespace llama_moe
