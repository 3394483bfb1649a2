// AVX2 with FMA and F16C: Haswell and Zen, and newer. Compiled for those; nothing of it runs elsewhere.
#include "multiply.h"
#include "vectors_256.h"

namespace llama_moe::experts {
namespace {

struct Avx2 : Vectors256 {
    static constexpr int kOffset = 0;
    static Bytes raise(Bytes bytes) { return bytes; }

    // 16-bit sums, of two products each: how many of them fit is a power of two. Sums that are centred fit in the end, though not before.
    static constexpr bool kPairs = true;
    using Sums = Ints;
    template <class F>
    static constexpr int steps_of_sums() {
        constexpr int kLargest = kCentres<Avx2, F> ? std::max(F::kRaised, F::kLargest - F::kRaised) : F::kLargest;
        int steps = 1;
        while (2 * steps * 2 * kLargest * 127 <= 32767 && 2 * steps <= F::kSub / kStep) {
            steps *= 2;
        }
        return steps;
    }

    // maddubs takes one operand without sign; that of signed weights goes to the activations.
    template <class F>
    static Sums first_sums(Bytes weights, const std::int8_t* values) {
        const __m256i word = broadcast_word(values);
        if constexpr (F::kSigned) {
            return {_mm256_maddubs_epi16(_mm256_abs_epi8(weights.low), _mm256_sign_epi8(word, weights.low)),
                    _mm256_maddubs_epi16(_mm256_abs_epi8(weights.high), _mm256_sign_epi8(word, weights.high))};
        } else {
            return {_mm256_maddubs_epi16(weights.low, word), _mm256_maddubs_epi16(weights.high, word)};
        }
    }
    template <class F>
    static void add_products(Sums& sums, Bytes weights, const std::int8_t* values) {
        const Sums products = first_sums<F>(weights, values);
        sums = {_mm256_add_epi16(sums.low, products.low), _mm256_add_epi16(sums.high, products.high)};
    }
    template <class F>
    static void centre(Sums& sums, const std::int16_t (&halves)[2]) {
        static_assert(steps_of_sums<F>() == F::kSub / kStep && F::kSub == 16 && (F::kRaised & (F::kRaised - 1)) == 0);
        const __m256i raised = _mm256_mullo_epi16(broadcast_word(halves), _mm256_set1_epi16(F::kRaised));
        sums = {_mm256_sub_epi16(sums.low, raised), _mm256_sub_epi16(sums.high, raised)};
    }
    static Ints to_ints(Sums sums) {
        const __m256i ones = _mm256_set1_epi16(1);
        return {_mm256_madd_epi16(sums.low, ones), _mm256_madd_epi16(sums.high, ones)};
    }

    // Each scale twice, for two neighbouring sums.
    using Scale = Ints;
    using Scaled = Ints;
    template <class F>
    static Scale make_scale(const std::int8_t* bytes, Floats) {
        const __m256i all = _mm256_broadcastsi128_si256(load_quarter(bytes));
        // Bytes without sign are shuffled to the lower half of a 16-bit number, others to the upper half, and shifted down with their sign.
        constexpr bool kSignedScales = !F::kMinimums;
        const auto widen = [&](int first) {
            const auto word = [&](int row) {
                const unsigned twice = static_cast<unsigned>(first + row) * 0x00010001u;
                return static_cast<int>(kSignedScales ? twice << 8 | 0x00800080u : twice | 0x80008000u);
            };
            const __m256i order = _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7));
            const __m256i shuffled = _mm256_shuffle_epi8(all, order);
            return kSignedScales ? _mm256_srai_epi16(shuffled, 8) : shuffled;
        };
        return {widen(0), widen(8)};
    }
    template <int Subs>
    static Ints products_of_pairs(const std::int8_t* minimums, const std::int16_t* sums) {
        Ints total = zero_scaled();
        for_constants<Subs / 2>([&](auto pair) {
            const __m128i first = load_quarter(minimums + 2 * kGroupRows * pair);
            const __m128i second = load_quarter(minimums + 2 * kGroupRows * pair + kGroupRows);
            const Ints both = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second)), _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second))};
            const __m256i two_sums = broadcast_word(sums + 2 * pair);
            add_scaled(total, both, {two_sums, two_sums});
        });
        return total;
    }
    static Scaled zero_scaled() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static void add_scaled(Scaled& products, Sums sums, Scale scale) {
        products = add(products, {_mm256_madd_epi16(sums.low, scale.low), _mm256_madd_epi16(sums.high, scale.high)});
    }
    static Floats total(Scaled products, Floats factors) { return multiply(to_floats(products), factors); }
};

}  // namespace

const KernelSet avx2_kernels = {"avx2", find_multiply<Avx2>, round_row, apply_glu, dot};

}  // namespace llama_moe::experts
