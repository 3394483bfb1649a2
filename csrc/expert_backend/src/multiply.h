#pragma once

#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "kernels.h"
#include "tile.h"

// The loops, for all formats and processors. An Arch has the vectors:
//   Bytes, 64 of them: load, store, bit_or, low_nibbles, high_nibbles, bits<from, count, to>, table, look_up, raise;
//   kOffset: what raise() adds to signed weights, 0 where products of signed weights are as good as others;
//   Floats, one for each row: load_floats, store, broadcast, multiply, fma(a, b, c) = a x b + c, and those made from_halves, from_bf16, from_bytes;
//   Sums, of products of four weights of a row: first_sums<F> and add_products<F>, of steps_of_sums<F>() steps at most;
//   Ints, sums of any number of steps: to_ints(Sums), add, to_floats;
//   Scale and Scaled, sums times integer scales: make_scale<F>(bytes, factors), zero_scaled, add_scaled, and total(Scaled, factors), in which
//   the factors are used by one of make_scale and total;
//   kPairs, whether Sums are pairs of 16-bit numbers, which are few bits: then centre<F>(sums, halves) takes off what raised weights of a
//   super-block add, and products_of_pairs<count>(minimums, sums) are those of the minimums of subs with the sums of the activations;
//   kTokensAtOnce: so many tokens are multiplied with weights that are in registers.
namespace llama_moe::experts {
namespace {  // see tile.h

// Unpacked weights are used for so many tokens before the next ones are unpacked; their totals stay in the first level of the cache.
constexpr int kTokensOfTile = 64;

using Totals = float[kTokensOfTile][kGroupRows];

// Calls work(first token, number of tokens as a constant) for all tokens.
template <int AtOnce, class Work>
inline void for_tokens(int tokens, Work work) {
    int t = 0;
    for (; t + AtOnce <= tokens; t += AtOnce) {
        work(t, kAt<AtOnce>);
    }
    if constexpr (AtOnce > 4) {
        if (t + 4 <= tokens) {
            work(t, kAt<4>);
            t += 4;
        }
    }
    if constexpr (AtOnce > 1) {
        switch (tokens - t) {
            case 3: work(t, kAt<3>); break;
            case 2: work(t, kAt<2>); break;
            case 1: work(t, kAt<1>); break;
            default: break;
        }
    }
}

// Of several rows of activations, what a kernel reads: pointers to the columns of a tile.
template <int Tokens>
struct TileRows {
    const std::int8_t* values[Tokens];
    const float* scales[Tokens];
    const float* sums[Tokens];
    const SumsOfSuperBlock* sums_of_super_block[Tokens];

    template <class F>
    void set(int t, F, const ActivationRows& activations, std::int64_t row, std::int64_t column) {
        const std::int64_t from = row * activations.k + column;
        values[t] = activations.values + from;
        scales[t] = activations.scales + from / (F::kSuperBlock ? 256 : 32);
        if constexpr (F::kSuperBlock) {
            const SumsOfSuperBlock& all = activations.sums_of_super_blocks[from / 256];
            sums[t] = F::kSub == 16 ? all.of_16 : all.of_32;
            sums_of_super_block[t] = &all;
        } else {
            sums[t] = activations.sums + from / 32;
        }
    }
};

// Whether what unpacked weights are too large by is taken off their sums; else it is taken off in the end.
template <class Arch, class F>
constexpr bool kCentres = Arch::kPairs && F::kSuperBlock && F::kRaised != 0;
template <class Arch, class F>
constexpr int kRaisedBy = F::kSigned ? Arch::kOffset : kCentres<Arch, F> ? 0 : F::kRaised;
template <class Arch, class F>
constexpr bool kUsesSums = F::kMinimums || kRaisedBy<Arch, F> != 0;

// Minus the factors of a super-block's minimums. Where weights are raised its scales are the minimums.
template <class Arch, class F>
inline typename Arch::Floats minimum_factors(const std::uint8_t* group, typename Arch::Floats factors) {
    if constexpr (F::kMinimums) {
        return Arch::multiply(Arch::from_halves(group + F::kFactors + 2 * kGroupRows), Arch::broadcast(-1.0f));
    } else {
        return Arch::multiply(factors, Arch::broadcast(static_cast<float>(-kRaisedBy<Arch, F>)));
    }
}
template <class F>
inline const std::int8_t* minimums_of_sub(const SubScales& scales, int sub) {
    return (F::kMinimums ? scales.minimums : scales.scales) + kGroupRows * sub;
}

// The minimums of a super-block times the sums of the activations.
template <class Arch, class F>
inline typename Arch::Floats multiply_minimums(const SubScales& scales, const TileRows<1>& row) {
    constexpr int kSubs = kTileColumns / F::kSub;
    if constexpr (Arch::kPairs && F::kMinimums) {
        const SumsOfSuperBlock& sums = *row.sums_of_super_block[0];
        return Arch::to_floats(Arch::template products_of_pairs<kSubs>(scales.minimums, F::kSub == 16 ? sums.integers_of_16 : sums.integers_of_32));
    } else {
        auto total = Arch::broadcast(0.0f);
        for_constants<kSubs>(
            [&](auto sub) { total = Arch::fma(Arch::from_bytes(minimums_of_sub<F>(scales, sub)), Arch::broadcast(row.sums[0][sub]), total); });
        return total;
    }
}

// What is added for each sum of the activations of a block.
template <class Arch, class F>
inline typename Arch::Floats block_minimums(const std::uint8_t* group, typename Arch::Floats scales) {
    if constexpr (F::kMinimums) {
        return F::template minimums<Arch>(group);
    } else {
        return Arch::multiply(scales, Arch::broadcast(static_cast<float>(-kRaisedBy<Arch, F>)));
    }
}

// Weights are read once, from the beginning to the end. What hardware fetches by itself stops at the end of each page and is late while there is
// much to compute, and a few loads at once are all that it has in flight: so each load asks for what is read a page later. All of a block's
// requests at its beginning would be too many (measured on Zen 3). Reaching past the last weights does no harm.
template <class Arch>
struct Prefetching : Arch {
    static typename Arch::Bytes load(const std::uint8_t* from) {
        __builtin_prefetch(from + 4096);
        return Arch::load(from);
    }
};

// One token, the way text is generated: the weights are multiplied as they are unpacked.

template <class Arch, class F>
inline typename Arch::Floats add_super_block(const std::uint8_t* group, const TileRows<1>& row, typename Arch::Floats total) {
    constexpr int kSteps = F::kSub / kStep;
    constexpr int kStepsOfSums = Arch::template steps_of_sums<F>();
    constexpr int kRuns = kSteps / kStepsOfSums;
    SubScales scales;
    F::sub_scales(group, scales);
    const auto factors = Arch::from_halves(group + F::kFactors);
    auto products = Arch::zero_scaled();
    for_constants<F::kSpans>([&](auto span) {
        typename Arch::Sums sums[F::kSpanSubs][kRuns];
        F::template span<Prefetching<Arch>>(group, span, [&](auto i, auto step, auto weights) {
            auto& sum = sums[i][step / kStepsOfSums];
            const std::int8_t* values = row.values[0] + F::sub(span, i) * F::kSub + step * kStep;
            if constexpr (step % kStepsOfSums == 0) {
                sum = Arch::template first_sums<F>(weights, values);
            } else {
                Arch::template add_products<F>(sum, weights, values);
            }
            if constexpr (step % kStepsOfSums == kStepsOfSums - 1) {
                if constexpr (kCentres<Arch, F>) {
                    Arch::template centre<F>(sum, row.sums_of_super_block[0]->halves_of_16[F::sub(span, i)]);
                }
                Arch::add_scaled(products, sum, Arch::template make_scale<F>(scales.scales + kGroupRows * F::sub(span, i), factors));
            }
        });
    });
    auto sum = Arch::total(products, factors);
    if constexpr (kUsesSums<Arch, F>) {
        sum = Arch::fma(multiply_minimums<Arch, F>(scales, row), minimum_factors<Arch, F>(group, factors), sum);
    }
    return Arch::fma(sum, Arch::broadcast(*row.scales[0]), total);
}

template <class Arch, class F>
inline typename Arch::Floats add_block(const std::uint8_t* group, const TileRows<1>& row, typename Arch::Floats total) {
    constexpr int kSteps = F::kSub / kStep;
    constexpr int kStepsOfSums = Arch::template steps_of_sums<F>();
    constexpr int kRuns = kSteps / kStepsOfSums;
    typename Arch::Sums sums[kRuns];
    F::template span<Prefetching<Arch>>(group, kAt<0>, [&](auto, auto step, auto weights) {
        const std::int8_t* values = row.values[0] + step * kStep;
        if constexpr (step % kStepsOfSums == 0) {
            sums[step / kStepsOfSums] = Arch::template first_sums<F>(weights, values);
        } else {
            Arch::template add_products<F>(sums[step / kStepsOfSums], weights, values);
        }
    });
    auto products = Arch::to_ints(sums[0]);
    for_constants<kRuns - 1>([&](auto i) { products = Arch::add(products, Arch::to_ints(sums[i + 1])); });
    const auto scales = F::template scales<Arch>(group);
    total = Arch::fma(Arch::to_floats(products), Arch::multiply(scales, Arch::broadcast(*row.scales[0])), total);
    if constexpr (kUsesSums<Arch, F>) {
        total = Arch::fma(block_minimums<Arch, F>(group, scales), Arch::broadcast(*row.sums[0]), total);
    }
    return total;
}

template <class Arch, class F>
typename Arch::Floats multiply_row(const std::uint8_t* group, const ActivationRows& activations, std::int64_t row) {
    const std::int64_t k = activations.k;
    auto total = Arch::broadcast(0.0f);
    if constexpr (F::kSub == 0) {
        for (std::int64_t column = 0; column < k; column++, group += 2 * kGroupRows) {
            total = Arch::fma(F::template weights<Arch>(group), Arch::broadcast(activations.floats[row * k + column]), total);
        }
    } else {
        constexpr int kBlock = F::kSuperBlock ? 256 : 32;
        for (std::int64_t column = 0; column < k; column += kBlock, group += F::kBytes * kGroupRows) {
            TileRows<1> tile_row;
            tile_row.set(0, F(), activations, row, column);
            if constexpr (F::kSuperBlock) {
                total = add_super_block<Arch, F>(group, tile_row, total);
            } else {
                total = add_block<Arch, F>(group, tile_row, total);
            }
        }
    }
    return total;
}

// Several tokens: the weights of 16 rows and up to 256 columns are unpacked into a tile in the first level of the cache. Each has the result
// that it has alone, to the last bit: everything is added in the same order.

template <class Arch, class F>
struct Tile {
    static constexpr int kSubs = kTileColumns / F::kSub;
    alignas(64) std::uint8_t weights[kTileColumns / kStep][64];  // [step][4 x row + column in the step]
    typename Arch::Scale sub_scales[kSubs];  // of super-blocks: the integer ones, and what all of them are multiplied with
    typename Arch::Floats factors, factors_of_minimums;
    typename Arch::Floats scales[kSubs];     // of blocks
    typename Arch::Floats minimums[kSubs];   // of both: times the sums of the activations

    void unpack(const std::uint8_t* group, int blocks);
};

template <class Arch, class F>
inline void Tile<Arch, F>::unpack(const std::uint8_t* group, int blocks) {
    constexpr int kSteps = F::kSub / kStep;
    for (int b = 0; b < blocks; b++, group += F::kBytes * kGroupRows) {
        for_constants<F::kSpans>([&](auto span) {
            F::template span<Prefetching<Arch>>(group, span, [&](auto i, auto step, auto bytes) {
                Arch::store(weights[(b + F::sub(span, i)) * kSteps + step], bytes);
            });
        });
        if constexpr (F::kSuperBlock) {
            SubScales integers;
            F::sub_scales(group, integers);
            factors = Arch::from_halves(group + F::kFactors);
            factors_of_minimums = minimum_factors<Arch, F>(group, factors);
            for (int sub = 0; sub < kSubs; sub++) {
                sub_scales[sub] = Arch::template make_scale<F>(integers.scales + kGroupRows * sub, factors);
                if constexpr (kUsesSums<Arch, F>) {
                    minimums[sub] = Arch::from_bytes(minimums_of_sub<F>(integers, sub));
                }
            }
        } else {
            scales[b] = F::template scales<Arch>(group);
            if constexpr (kUsesSums<Arch, F>) {
                minimums[b] = block_minimums<Arch, F>(group, scales[b]);
            }
        }
    }
}

// The products of `Steps` steps with each token.
template <class Arch, class F, int Steps, int Tokens>
[[gnu::always_inline]] inline void sum_products(const std::uint8_t (*weights)[64], const TileRows<Tokens>& rows, int column, typename Arch::Sums (&sums)[Tokens]) {
    for_constants<Steps>([&](auto step) {
        const auto bytes = Arch::load(weights[step]);
        for_constants<Tokens>([&](auto t) {
            const std::int8_t* values = rows.values[t] + column + step * kStep;
            if constexpr (step == 0) {
                sums[t] = Arch::template first_sums<F>(bytes, values);
            } else {
                Arch::template add_products<F>(sums[t], bytes, values);
            }
        });
    });
}

template <class Arch, class F, int Tokens>
inline void add_tile(const Tile<Arch, F>& tile, int blocks, const TileRows<Tokens>& rows, float (*totals)[kGroupRows]) {
    constexpr int kSteps = F::kSub / kStep;
    constexpr int kStepsOfSums = Arch::template steps_of_sums<F>();
    constexpr int kRuns = kSteps / kStepsOfSums;
    typename Arch::Sums sums[Tokens];
    typename Arch::Floats total[Tokens];
    if constexpr (F::kSuperBlock) {
        typename Arch::Scaled products[Tokens];
        for_constants<Tokens>([&](auto t) { products[t] = Arch::zero_scaled(); });
        for (int i = 0; i < Tile<Arch, F>::kSubs; i++) {
            const int sub = F::sub(i / F::kSpanSubs, i % F::kSpanSubs);
            const auto scale = tile.sub_scales[sub];
            for_constants<kRuns>([&](auto run) {
                constexpr int kFirst = run * kStepsOfSums;
                sum_products<Arch, F, kStepsOfSums>(tile.weights + sub * kSteps + kFirst, rows, sub * F::kSub + kFirst * kStep, sums);
                for_constants<Tokens>([&](auto t) {
                    if constexpr (kCentres<Arch, F>) {
                        Arch::template centre<F>(sums[t], rows.sums_of_super_block[t]->halves_of_16[sub]);
                    }
                    Arch::add_scaled(products[t], sums[t], scale);
                });
            });
        }
        for_constants<Tokens>([&](auto t) { total[t] = Arch::total(products[t], tile.factors); });
        if constexpr (kUsesSums<Arch, F>) {
            typename Arch::Floats minimums[Tokens];
            for_constants<Tokens>([&](auto t) { minimums[t] = Arch::broadcast(0.0f); });
            for (int sub = 0; sub < Tile<Arch, F>::kSubs; sub++) {
                for_constants<Tokens>([&](auto t) { minimums[t] = Arch::fma(tile.minimums[sub], Arch::broadcast(rows.sums[t][sub]), minimums[t]); });
            }
            for_constants<Tokens>([&](auto t) { total[t] = Arch::fma(minimums[t], tile.factors_of_minimums, total[t]); });
        }
        for_constants<Tokens>([&](auto t) {
            Arch::store(totals[t], Arch::fma(total[t], Arch::broadcast(*rows.scales[t]), Arch::load_floats(totals[t])));
        });
    } else {
        for_constants<Tokens>([&](auto t) { total[t] = Arch::load_floats(totals[t]); });
        for (int b = 0; b < blocks; b++) {
            typename Arch::Ints products[Tokens];
            for_constants<kRuns>([&](auto run) {
                constexpr int kFirst = run * kStepsOfSums;
                sum_products<Arch, F, kStepsOfSums>(tile.weights + b * kSteps + kFirst, rows, b * F::kSub + kFirst * kStep, sums);
                for_constants<Tokens>([&](auto t) {
                    const auto ints = Arch::to_ints(sums[t]);
                    if constexpr (run == 0) {
                        products[t] = ints;
                    } else {
                        products[t] = Arch::add(products[t], ints);
                    }
                });
            });
            for_constants<Tokens>([&](auto t) {
                total[t] = Arch::fma(Arch::to_floats(products[t]), Arch::multiply(tile.scales[b], Arch::broadcast(rows.scales[t][b])), total[t]);
                if constexpr (kUsesSums<Arch, F>) {
                    total[t] = Arch::fma(tile.minimums[b], Arch::broadcast(rows.sums[t][b]), total[t]);
                }
            });
        }
        for_constants<Tokens>([&](auto t) { Arch::store(totals[t], total[t]); });
    }
}

template <class Arch, class F, int Tokens>
inline void add_floats(const std::uint8_t* group, std::int64_t k, const float* const* values, float (*totals)[kGroupRows]) {
    typename Arch::Floats total[Tokens];
    for_constants<Tokens>([&](auto t) { total[t] = Arch::load_floats(totals[t]); });
    for (std::int64_t column = 0; column < k; column++, group += 2 * kGroupRows) {
        const auto weights = F::template weights<Arch>(group);
        for_constants<Tokens>([&](auto t) { total[t] = Arch::fma(weights, Arch::broadcast(values[t][column]), total[t]); });
    }
    for_constants<Tokens>([&](auto t) { Arch::store(totals[t], total[t]); });
}

template <class Arch, class F>
void add_tokens(const std::uint8_t* group, const ActivationRows& activations, const std::int32_t* rows, int tokens, Totals& totals) {
    const std::int64_t k = activations.k;
    if constexpr (F::kSub == 0) {
        for_tokens<Arch::kTokensAtOnce>(tokens, [&](int first, auto count) {
            const float* values[count];
            for (int t = 0; t < count; t++) {
                values[t] = activations.floats + rows[first + t] * k;
            }
            add_floats<Arch, F, count>(group, k, values, totals + first);
        });
    } else {
        Tile<Arch, F> tile;
        for (std::int64_t column = 0; column < k; column += kTileColumns) {
            const int columns = static_cast<int>(std::min<std::int64_t>(kTileColumns, k - column));
            const int blocks = columns / (F::kSuperBlock ? 256 : 32);
            tile.unpack(group, blocks);
            group += blocks * F::kBytes * kGroupRows;
            for_tokens<Arch::kTokensAtOnce>(tokens, [&](int first, auto count) {
                TileRows<count> tile_rows;
                for (int t = 0; t < count; t++) {
                    tile_rows.set(t, F(), activations, rows[first + t], column);
                }
                add_tile<Arch, F, count>(tile, blocks, tile_rows, totals + first);
            });
        }
    }
}

template <class Arch, class F>
void multiply_group(const std::uint8_t* group, const ActivationRows& activations, const std::int32_t* rows, float* const* outputs, int tokens) {
    if (tokens == 1) {
        Arch::store(outputs[0], multiply_row<Arch, F>(group, activations, rows[0]));
        return;
    }
    for (int first = 0; first < tokens; first += kTokensOfTile) {
        const int count = std::min(kTokensOfTile, tokens - first);
        alignas(64) Totals totals;
        std::memset(totals, 0, static_cast<std::size_t>(count) * sizeof totals[0]);
        add_tokens<Arch, F>(group, activations, rows + first, count, totals);
        for (int t = 0; t < count; t++) {
            std::memcpy(outputs[first + t], totals[t], sizeof totals[t]);
        }
    }
}

template <class Arch>
MultiplyGroup find_multiply(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0: return multiply_group<Arch, Q4_0>;
        case GGML_TYPE_Q4_1: return multiply_group<Arch, Q4_1>;
        case GGML_TYPE_Q5_0: return multiply_group<Arch, Q5_0>;
        case GGML_TYPE_Q5_1: return multiply_group<Arch, Q5_1>;
        case GGML_TYPE_Q8_0: return multiply_group<Arch, Q8_0>;
        case GGML_TYPE_IQ4_NL: return multiply_group<Arch, Iq4Nl>;
        case GGML_TYPE_MXFP4: return multiply_group<Arch, Mxfp4>;
        case GGML_TYPE_Q2_K: return multiply_group<Arch, Q2_K>;
        case GGML_TYPE_Q3_K: return multiply_group<Arch, Q3_K>;
        case GGML_TYPE_Q4_K: return multiply_group<Arch, Q4_K>;
        case GGML_TYPE_Q5_K: return multiply_group<Arch, Q5_K>;
        case GGML_TYPE_Q6_K: return multiply_group<Arch, Q6_K>;
        case GGML_TYPE_IQ4_XS: return multiply_group<Arch, Iq4Xs>;
        case GGML_TYPE_F16: return multiply_group<Arch, F16>;
        case GGML_TYPE_BF16: return multiply_group<Arch, Bf16>;
        default: return nullptr;
    }
}

}  // namespace
}  // namespace llama_moe::experts
