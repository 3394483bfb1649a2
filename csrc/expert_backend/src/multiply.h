#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "tile.h"

// The loops around an Arch's products, for all formats. An Arch has
//   Bytes, load, store, bit_or, low_nibbles, high_nibbles, bits, table, look_up, raise, to_floats: what tile.h unpacks with;
//   kOffset: what raise() adds to signed weights, 0 where products of signed weights are as good as others;
//   add_super_block<F, Tokens>, add_blocks<F, Tokens>, add_floats<F, Tokens>: a tile times `Tokens` rows, added to their totals.
namespace llama_moe::experts {
namespace {  // see tile.h

// Unpacked weights are used for so many tokens before the next ones are unpacked; their totals stay in the first level of the cache.
constexpr int kTokensOfTile = 64;
// So many tokens are multiplied with weights that are in registers.
constexpr int kTokensAtOnce = 4;

using Totals = float[kTokensOfTile][kGroupRows];

// Calls work(first token, number of tokens as a constant) for all tokens.
template <class Work>
inline void for_tokens(int tokens, Work work) {
    int t = 0;
    for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce) {
        work(t, std::integral_constant<int, kTokensAtOnce>());
    }
    switch (tokens - t) {
        case 3: work(t, std::integral_constant<int, 3>()); break;
        case 2: work(t, std::integral_constant<int, 2>()); break;
        case 1: work(t, std::integral_constant<int, 1>()); break;
        default: break;
    }
}

// Of several rows of activations, what a kernel reads: pointers to the columns of a tile.
template <int Tokens>
struct TileRows {
    const std::int8_t* values[Tokens];
    const float* scales[Tokens];
    const std::int16_t* sums[Tokens];        // of super-blocks
    const float* scaled_sums[Tokens];        // of blocks
};

template <class Arch, class F>
void add_tokens(const std::uint8_t* group, const ActivationRows& activations, const std::int32_t* rows, int tokens, Totals& totals) {
    const std::int64_t k = activations.k;
    if constexpr (F::kSub == 0) {
        for_tokens(tokens, [&](int first, auto count) {
            const float* values[count];
            for (int t = 0; t < count; t++) {
                values[t] = activations.floats + rows[first + t] * k;
            }
            Arch::template add_floats<F, count>(group, k, values, totals + first);
        });
    } else {
        constexpr int kBlock = F::kSuperBlock ? 256 : 32;
        Tile tile;
        for (std::int64_t column = 0; column < k; column += kTileColumns) {
            const int columns = static_cast<int>(std::min<std::int64_t>(kTileColumns, k - column));
            const int blocks = columns / kBlock;
            F::template unpack<Arch>(group, blocks, tile);
            group += blocks * F::kBytes * kGroupRows;
            for_tokens(tokens, [&](int first, auto count) {
                TileRows<count> tile_rows;
                for (int t = 0; t < count; t++) {
                    const std::int64_t from = rows[first + t] * k + column;
                    tile_rows.values[t] = activations.values + from;
                    if constexpr (F::kSuperBlock) {
                        tile_rows.scales[t] = activations.scales + from / 256;
                        tile_rows.sums[t] = activations.sums + from / 16;
                    } else {
                        tile_rows.scales[t] = activations.scales + from / 32;
                        tile_rows.scaled_sums[t] = activations.scaled_sums + from / 32;
                    }
                }
                if constexpr (F::kSuperBlock) {
                    Arch::template add_super_block<F, count>(tile, tile_rows, totals + first);
                } else {
                    Arch::template add_blocks<F, count>(tile, blocks, tile_rows, totals + first);
                }
            });
        }
    }
}

template <class Arch, class F>
void multiply_group(const std::uint8_t* group, const ActivationRows& activations, const std::int32_t* rows, float* const* outputs, int tokens) {
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
