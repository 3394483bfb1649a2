// AVX2 with FMA and F16C: Haswell and Zen, and newer. Compiled for those; nothing of it runs elsewhere.
#include <immintrin.h>

#include "multiply.h"

namespace llama_moe::experts {
namespace {

struct Avx2 {
    // Rows 0 to 7, and 8 to 15.
    struct Bytes {
        __m256i low, high;
    };
    static constexpr int kOffset = 0;

    static Bytes load(const std::uint8_t* from) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32))};
    }
    static void store(std::uint8_t* to, Bytes bytes) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes.low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), bytes.high);
    }
    static Bytes bit_or(Bytes a, Bytes b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
    static Bytes low_nibbles(Bytes bytes) { return bits(bytes, 0, 4, 0); }
    static Bytes high_nibbles(Bytes bytes) { return bits(bytes, 4, 4, 0); }
    static Bytes bits(Bytes bytes, int from, int count, int to) {
        const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << count) - 1) << to));
        const auto take = [&](__m256i v) {
            return _mm256_and_si256(from >= to ? _mm256_srli_epi16(v, from - to) : _mm256_slli_epi16(v, to - from), mask);
        };
        return {take(bytes.low), take(bytes.high)};
    }
    static __m256i table(const std::int8_t* values) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))); }
    static Bytes look_up(__m256i table, Bytes indices) { return {_mm256_shuffle_epi8(table, indices.low), _mm256_shuffle_epi8(table, indices.high)}; }
    static Bytes raise(Bytes bytes) { return bytes; }
    static void to_floats(const std::uint8_t* halves, float* floats) {
        _mm256_store_ps(floats, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
        _mm256_store_ps(floats + 8, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 16))));
    }

    static __m256i load_words(const std::uint32_t* words) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(words)); }
    template <class Number>
    static __m256i broadcast(const Number* numbers) {
        std::int32_t word;
        std::memcpy(&word, numbers, 4);
        return _mm256_set1_epi32(word);
    }

    // Sums of products of four columns of 8 rows, for some steps: 16-bit sums of two columns each. `Steps` of them must fit.
    template <class F, int Tokens, int Steps>
    static void dot(const Tile& tile, int first_step, const TileRows<Tokens>& rows, __m256i (&sums)[Tokens][2]) {
        for (int t = 0; t < Tokens; t++) {
            sums[t][0] = sums[t][1] = _mm256_setzero_si256();
        }
#pragma GCC unroll 8
        for (int step = first_step; step < first_step + Steps; step++) {
            const Bytes weights = {_mm256_load_si256(reinterpret_cast<const __m256i*>(tile.weights[step])),
                                   _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.weights[step] + 32))};
            Bytes absolute = weights;
            if constexpr (F::kSigned) {
                absolute = {_mm256_abs_epi8(weights.low), _mm256_abs_epi8(weights.high)};
            }
#pragma GCC unroll 4
            for (int t = 0; t < Tokens; t++) {
                const __m256i values = broadcast(rows.values[t] + kStep * step);
                Bytes signs = {values, values};
                if constexpr (F::kSigned) {
                    signs = {_mm256_sign_epi8(values, weights.low), _mm256_sign_epi8(values, weights.high)};
                }
                sums[t][0] = _mm256_add_epi16(sums[t][0], _mm256_maddubs_epi16(absolute.low, signs.low));
                sums[t][1] = _mm256_add_epi16(sums[t][1], _mm256_maddubs_epi16(absolute.high, signs.high));
            }
        }
    }

    // How many steps' sums of two products fit into 16 bits, as a power of two.
    template <class F>
    static constexpr int steps_that_fit() {
        int steps = 1;
        while (2 * steps * 2 * F::kLargest * 127 <= 32767 && 2 * steps <= F::kSub / kStep) {
            steps *= 2;
        }
        return steps;
    }

    template <class F, int Tokens>
    static void add_super_block(const Tile& tile, const TileRows<Tokens>& rows, float (*totals)[kGroupRows]) {
        constexpr int kSteps = steps_that_fit<F>();
        __m256i products[Tokens][2];
        for (int t = 0; t < Tokens; t++) {
            products[t][0] = products[t][1] = _mm256_setzero_si256();
        }
        for (int sub = 0; sub < kTileColumns / F::kSub; sub++) {
            const __m256i scales[2] = {load_words(tile.scales[sub]), load_words(tile.scales[sub] + 8)};
#pragma GCC unroll 8
            for (int run = 0; run < F::kSub / kStep / kSteps; run++) {
                __m256i sums[Tokens][2];
                dot<F, Tokens, kSteps>(tile, sub * (F::kSub / kStep) + run * kSteps, rows, sums);
#pragma GCC unroll 4
                for (int t = 0; t < Tokens; t++) {
                    products[t][0] = _mm256_add_epi32(products[t][0], _mm256_madd_epi16(sums[t][0], scales[0]));
                    products[t][1] = _mm256_add_epi32(products[t][1], _mm256_madd_epi16(sums[t][1], scales[1]));
                }
            }
        }
        for (int half = 0; half < 2; half++) {
            const __m256 factors = _mm256_load_ps(tile.factors + 8 * half);
            const __m256 minimum_factors = F::kMinimums ? _mm256_load_ps(tile.minimum_factors + 8 * half) : _mm256_setzero_ps();
            for (int t = 0; t < Tokens; t++) {
                __m256 total = _mm256_mul_ps(_mm256_cvtepi32_ps(products[t][half]), factors);
                if constexpr (F::kMinimums) {
                    __m256i minimums = _mm256_setzero_si256();
                    for (int i = 0; i < kTileColumns / 32; i++) {
                        minimums = _mm256_add_epi32(minimums, _mm256_madd_epi16(load_words(tile.minimums[i] + 8 * half), broadcast(rows.sums[t] + 2 * i)));
                    }
                    total = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(minimums), minimum_factors, total);
                }
                float* to = totals[t] + 8 * half;
                _mm256_store_ps(to, _mm256_fmadd_ps(total, _mm256_broadcast_ss(rows.scales[t]), _mm256_load_ps(to)));
            }
        }
    }

    template <class F, int Tokens>
    static void add_blocks(const Tile& tile, int blocks, const TileRows<Tokens>& rows, float (*totals)[kGroupRows]) {
        constexpr int kSteps = steps_that_fit<F>();
        const __m256i ones = _mm256_set1_epi16(1);
        __m256 sum[Tokens][2];
        for (int t = 0; t < Tokens; t++) {
            sum[t][0] = _mm256_load_ps(totals[t]);
            sum[t][1] = _mm256_load_ps(totals[t] + 8);
        }
        for (int b = 0; b < blocks; b++) {
            __m256i products[Tokens][2];
#pragma GCC unroll 8
            for (int run = 0; run < 8 / kSteps; run++) {
                __m256i sums[Tokens][2];
                dot<F, Tokens, kSteps>(tile, 8 * b + run * kSteps, rows, sums);
#pragma GCC unroll 4
                for (int t = 0; t < Tokens; t++) {
                    for (int half = 0; half < 2; half++) {
                        const __m256i wide = _mm256_madd_epi16(sums[t][half], ones);
                        products[t][half] = run == 0 ? wide : _mm256_add_epi32(products[t][half], wide);
                    }
                }
            }
            for (int half = 0; half < 2; half++) {
                const __m256 scales = _mm256_load_ps(tile.block_scales[b] + 8 * half);
                const __m256 offsets = F::kMinimums ? _mm256_load_ps(tile.block_offsets[b] + 8 * half) : _mm256_setzero_ps();
                for (int t = 0; t < Tokens; t++) {
                    const __m256 scale = _mm256_mul_ps(scales, _mm256_broadcast_ss(rows.scales[t] + b));
                    sum[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[t][half]), scale, sum[t][half]);
                    if constexpr (F::kMinimums) {
                        sum[t][half] = _mm256_fmadd_ps(offsets, _mm256_broadcast_ss(rows.scaled_sums[t] + b), sum[t][half]);
                    }
                }
            }
        }
        for (int t = 0; t < Tokens; t++) {
            _mm256_store_ps(totals[t], sum[t][0]);
            _mm256_store_ps(totals[t] + 8, sum[t][1]);
        }
    }

    template <class F>
    static __m256 load_weights(const std::uint8_t* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        if constexpr (F::kType == GGML_TYPE_BF16) {
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        } else {
            return _mm256_cvtph_ps(bits);
        }
    }

    template <class F, int Tokens>
    static void add_floats(const std::uint8_t* group, std::int64_t k, const float* const* values, float (*totals)[kGroupRows]) {
        __m256 sum[Tokens][2];
        for (int t = 0; t < Tokens; t++) {
            sum[t][0] = _mm256_load_ps(totals[t]);
            sum[t][1] = _mm256_load_ps(totals[t] + 8);
        }
        for (std::int64_t column = 0; column < k; column++, group += 2 * kGroupRows) {
            const __m256 low = load_weights<F>(group);
            const __m256 high = load_weights<F>(group + 16);
            for (int t = 0; t < Tokens; t++) {
                const __m256 value = _mm256_broadcast_ss(values[t] + column);
                sum[t][0] = _mm256_fmadd_ps(low, value, sum[t][0]);
                sum[t][1] = _mm256_fmadd_ps(high, value, sum[t][1]);
            }
        }
        for (int t = 0; t < Tokens; t++) {
            _mm256_store_ps(totals[t], sum[t][0]);
            _mm256_store_ps(totals[t] + 8, sum[t][1]);
        }
    }
};

}  // namespace

const KernelSet avx2_kernels = {"avx2", find_multiply<Avx2>};

}  // namespace llama_moe::experts
