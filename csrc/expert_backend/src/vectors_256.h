#pragma once

#include "intrinsics.h"
#include "tile.h"

namespace llama_moe::experts {
namespace {  // see tile.h

// Vectors of AVX2 with FMA and F16C, in pairs: rows 0 to 7, and 8 to 15.
struct Vectors256 {
    struct Bytes {
        __m256i low, high;
    };
    struct Ints {
        __m256i low, high;
    };
    struct Floats {
        __m256 low, high;
    };
    static constexpr int kTokensAtOnce = 4;

    static __m256i load_half(const std::uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static __m128i load_quarter(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

    static Bytes load(const std::uint8_t* from) { return {load_half(from), load_half(from + 32)}; }
    static void store(std::uint8_t* to, Bytes bytes) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes.low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), bytes.high);
    }
    static Bytes bit_or(Bytes a, Bytes b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
    static Bytes low_nibbles(Bytes bytes) { return bits<0, 4, 0>(bytes); }
    static Bytes high_nibbles(Bytes bytes) { return bits<4, 4, 0>(bytes); }
    template <int From, int Count, int To>
    static Bytes bits(Bytes bytes) {
        const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << Count) - 1) << To));
        const auto take = [&](__m256i v) {
            if constexpr (From > To) {
                v = _mm256_srli_epi16(v, From - To);
            } else if constexpr (From < To) {
                v = _mm256_slli_epi16(v, To - From);
            }
            return _mm256_and_si256(v, mask);
        };
        return {take(bytes.low), take(bytes.high)};
    }
    static __m256i table(const std::int8_t* values) { return _mm256_broadcastsi128_si256(load_quarter(values)); }
    static Bytes look_up(__m256i table, Bytes indices) { return {_mm256_shuffle_epi8(table, indices.low), _mm256_shuffle_epi8(table, indices.high)}; }

    static __m256i broadcast_word(const void* values) {
        std::int32_t word;
        std::memcpy(&word, values, 4);
        return _mm256_set1_epi32(word);
    }
    static Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
    static Floats to_floats(Ints ints) { return {_mm256_cvtepi32_ps(ints.low), _mm256_cvtepi32_ps(ints.high)}; }

    static Floats load_floats(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static void store(float* to, Floats floats) {
        _mm256_storeu_ps(to, floats.low);
        _mm256_storeu_ps(to + 8, floats.high);
    }
    static Floats broadcast(float number) { return {_mm256_set1_ps(number), _mm256_set1_ps(number)}; }
    static Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
    static Floats from_halves(const std::uint8_t* from) { return {_mm256_cvtph_ps(load_quarter(from)), _mm256_cvtph_ps(load_quarter(from + 16))}; }
    static Floats from_bf16(const std::uint8_t* from) {
        const auto widen = [](__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); };
        return {widen(load_quarter(from)), widen(load_quarter(from + 16))};
    }
    static Floats from_bytes(const std::int8_t* from) {
        const auto widen = [](const std::int8_t* bytes) {
            return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
        };
        return {widen(from), widen(from + 8)};
    }
};

}  // namespace
}  // namespace llama_moe::experts
