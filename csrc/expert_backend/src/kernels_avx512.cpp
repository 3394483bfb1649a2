// AVX-512 with VNNI: Cascade Lake, Ice Lake and Zen 4, and newer. Compiled for those; nothing of it runs elsewhere.
#include "dot_products.h"
#include "intrinsics.h"
#include "multiply.h"

namespace llama_moe::experts {
namespace {

struct Vectors512 {
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    // dpbusd takes weights without sign.
    static constexpr int kOffset = 128;
    static constexpr int kTokensAtOnce = 8;

    static __m128i load_quarter(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
    static __m256i load_half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

    static Bytes load(const std::uint8_t* from) { return _mm512_loadu_si512(from); }
    static void store(std::uint8_t* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
    static Bytes bit_or(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    static Bytes low_nibbles(Bytes bytes) { return bits<0, 4, 0>(bytes); }
    static Bytes high_nibbles(Bytes bytes) { return bits<4, 4, 0>(bytes); }
    template <int From, int Count, int To>
    static Bytes bits(Bytes bytes) {
        if constexpr (From > To) {
            bytes = _mm512_srli_epi16(bytes, From - To);
        } else if constexpr (From < To) {
            bytes = _mm512_slli_epi16(bytes, To - From);
        }
        return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(((1 << Count) - 1) << To)));
    }
    static Bytes table(const std::int8_t* values) { return _mm512_broadcast_i32x4(load_quarter(values)); }
    static Bytes look_up(Bytes table, Bytes indices) { return _mm512_shuffle_epi8(table, indices); }
    static Bytes raise(Bytes bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(kOffset))); }

    static Ints zero_ints() { return _mm512_setzero_si512(); }
    static Ints dot(Ints ints, Bytes weights, const std::int8_t* values) {
        std::int32_t word;
        std::memcpy(&word, values, 4);
        return _mm512_dpbusd_epi32(ints, weights, _mm512_set1_epi32(word));
    }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static Floats to_floats(Ints ints) { return _mm512_cvtepi32_ps(ints); }

    static Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats floats) { _mm512_storeu_ps(to, floats); }
    static Floats broadcast(float number) { return _mm512_set1_ps(number); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats from_halves(const std::uint8_t* from) { return _mm512_cvtph_ps(load_half(from)); }
    static Floats from_bf16(const std::uint8_t* from) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(from)), 16)); }
    static Floats from_bytes(const std::int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_quarter(from))); }
};

}  // namespace

const KernelSet avx512_kernels = {"avx512-vnni", find_multiply<DotProducts<Vectors512>>, round_row, apply_glu, dot};

}  // namespace llama_moe::experts
