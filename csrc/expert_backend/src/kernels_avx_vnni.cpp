// AVX-VNNI, the dot products of AVX-512 for vectors of 256 bits: Alder Lake and newer, Zen 5. Compiled for those; nothing of it runs elsewhere.
#include "dot_products.h"
#include "multiply.h"
#include "vectors_256.h"

namespace llama_moe::experts {
namespace {

struct AvxVnni : Vectors256 {
    // dpbusd takes weights without sign.
    static constexpr int kOffset = 128;
    static Bytes raise(Bytes bytes) {
        const __m256i sign = _mm256_set1_epi8(static_cast<char>(kOffset));
        return {_mm256_xor_si256(bytes.low, sign), _mm256_xor_si256(bytes.high, sign)};
    }
    static Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Ints dot(Ints ints, Bytes weights, const std::int8_t* values) {
        const __m256i word = broadcast_word(values);
        return {_mm256_dpbusd_avx_epi32(ints.low, weights.low, word), _mm256_dpbusd_avx_epi32(ints.high, weights.high, word)};
    }
};

}  // namespace

const KernelSet avx_vnni_kernels = {"avx-vnni", find_multiply<DotProducts<AvxVnni>>, round_row, apply_glu, dot};

}  // namespace llama_moe::experts
