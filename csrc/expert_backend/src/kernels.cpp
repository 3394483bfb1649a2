#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(LLAMA_MOE_HAS_AVX_VNNI_KERNELS)
#include <cpuid.h>
#endif

namespace llama_moe::experts {
namespace {

#if defined(LLAMA_MOE_HAS_AVX_VNNI_KERNELS)
// Older compilers do not know its name.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

#if defined(LLAMA_MOE_HAS_NEON_KERNELS)
bool has_dot_products() {
#if defined(__APPLE__)
    return true;  // all of Apple's processors that run macOS
#else
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
}
#endif

}  // namespace

const std::vector<KernelSet>& usable_kernels() {
    static const std::vector<KernelSet> usable = [] {
        std::vector<KernelSet> found;
#if defined(__x86_64__)
        // These ask the operating system too, whether it keeps the registers.
        [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(LLAMA_MOE_HAS_AVX512_KERNELS)
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
            found.push_back(avx512_kernels);
        }
#endif
#if defined(LLAMA_MOE_HAS_AVX_VNNI_KERNELS)
        if (avx2 && has_avx_vnni()) {
            found.push_back(avx_vnni_kernels);
        }
#endif
#if defined(LLAMA_MOE_HAS_AVX2_KERNELS)
        if (avx2) {
            found.push_back(avx2_kernels);
        }
#endif
#endif
#if defined(LLAMA_MOE_HAS_NEON_KERNELS)
        if (has_dot_products()) {
            found.push_back(neon_kernels);
        }
#endif
        found.push_back(portable_kernels);
        return found;
    }();
    return usable;
}

}  // namespace llama_moe::experts
