#include "kernels.h"

namespace llama_moe::experts {

const std::vector<KernelSet>& usable_kernels() {
    static const std::vector<KernelSet> usable = [] {
        std::vector<KernelSet> found;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
            found.push_back(avx2_kernels);
        }
#endif
        found.push_back(portable_kernels);
        return found;
    }();
    return usable;
}

}  // namespace llama_moe::experts
