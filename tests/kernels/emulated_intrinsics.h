// x86's vector instructions in plain C++, for kernels of processors that are not at hand: those of SIMDe, and what it lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wextra"
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#pragma GCC diagnostic pop

namespace emulated {

template <class Whole, class Half>
inline Whole join(Half low, Half high) {
    static_assert(sizeof(Whole) == 2 * sizeof(Half));
    Whole whole;
    __builtin_memcpy(&whole, &low, sizeof low);
    __builtin_memcpy(reinterpret_cast<char*>(&whole) + sizeof low, &high, sizeof high);
    return whole;
}
template <class Half, class Whole>
inline Half half(const Whole& whole, int i) {
    Half half;
    __builtin_memcpy(&half, reinterpret_cast<const char*>(&whole) + static_cast<unsigned>(i) * sizeof half, sizeof half);
    return half;
}

inline simde__m512 cvtph_ps(simde__m256i v) {
    return join<simde__m512>(simde_mm256_cvtph_ps(half<simde__m128i>(v, 0)), simde_mm256_cvtph_ps(half<simde__m128i>(v, 1)));
}
inline simde__m512i cvtepu16_epi32(simde__m256i v) {
    return join<simde__m512i>(simde_mm256_cvtepu16_epi32(half<simde__m128i>(v, 0)), simde_mm256_cvtepu16_epi32(half<simde__m128i>(v, 1)));
}
inline simde__m512i cvtepi8_epi32(simde__m128i v) {
    return join<simde__m512i>(simde_mm256_cvtepi8_epi32(v), simde_mm256_cvtepi8_epi32(simde_mm_srli_si128(v, 8)));
}
inline simde__m512 cvtepi32_ps(simde__m512i v) {
    return join<simde__m512>(simde_mm256_cvtepi32_ps(half<simde__m256i>(v, 0)), simde_mm256_cvtepi32_ps(half<simde__m256i>(v, 1)));
}

}  // namespace emulated

#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
