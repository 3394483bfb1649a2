// Plain C++: what the others are tested against, and what runs where there is no other.
#include <cstring>

#include "multiply.h"

namespace llama_moe::experts {
namespace {

struct Portable {
    struct Bytes {
        std::uint8_t at[64];
    };
    struct Table {
        std::int8_t at[16];
    };
    static constexpr int kOffset = 0;

    template <class Function>
    static Bytes each(Function function) {
        Bytes result;
        for (int i = 0; i < 64; i++) {
            result.at[i] = static_cast<std::uint8_t>(function(i));
        }
        return result;
    }
    static Bytes load(const std::uint8_t* from) {
        Bytes bytes;
        std::memcpy(bytes.at, from, 64);
        return bytes;
    }
    static void store(std::uint8_t* to, const Bytes& bytes) { std::memcpy(to, bytes.at, 64); }
    static Bytes bit_or(const Bytes& a, const Bytes& b) {
        return each([&](int i) { return a.at[i] | b.at[i]; });
    }
    static Bytes low_nibbles(const Bytes& bytes) {
        return each([&](int i) { return bytes.at[i] & 15; });
    }
    static Bytes high_nibbles(const Bytes& bytes) {
        return each([&](int i) { return bytes.at[i] >> 4; });
    }
    static Bytes bits(const Bytes& bytes, int from, int count, int to) {
        return each([&](int i) { return ((bytes.at[i] >> from) & ((1 << count) - 1)) << to; });
    }
    static Table table(const std::int8_t* values) {
        Table table;
        std::memcpy(table.at, values, 16);
        return table;
    }
    static Bytes look_up(const Table& table, const Bytes& indices) {
        return each([&](int i) { return table.at[indices.at[i]]; });
    }
    static Bytes raise(const Bytes& bytes) { return bytes; }

    static void to_floats(const std::uint8_t* halves, float* floats) {
        for (int row = 0; row < kGroupRows; row++) {
            std::uint16_t half;
            std::memcpy(&half, halves + 2 * row, 2);
            floats[row] = ggml_fp16_to_fp32(half);
        }
    }

    // The products of some steps of a row, as integers.
    template <class F>
    static int dot(const Tile& tile, int row, const std::int8_t* values, int first_step, int steps) {
        int sum = 0;
        for (int step = first_step; step < first_step + steps; step++) {
            for (int i = 0; i < kStep; i++) {
                const std::uint8_t weight = tile.weights[step][kStep * row + i];
                sum += (F::kSigned ? static_cast<std::int8_t>(weight) : static_cast<int>(weight)) * values[kStep * step + i];
            }
        }
        return sum;
    }

    static int low(std::uint32_t word) { return static_cast<std::int16_t>(word & 0xffff); }
    static int high(std::uint32_t word) { return static_cast<std::int16_t>(word >> 16); }

    template <class F, int Tokens>
    static void add_super_block(const Tile& tile, const TileRows<Tokens>& rows, float (*totals)[kGroupRows]) {
        for (int t = 0; t < Tokens; t++) {
            for (int row = 0; row < kGroupRows; row++) {
                int products = 0;
                for (int sub = 0; sub < kTileColumns / F::kSub; sub++) {
                    products += low(tile.scales[sub][row]) * dot<F>(tile, row, rows.values[t], sub * F::kSub / kStep, F::kSub / kStep);
                }
                float total = tile.factors[row] * static_cast<float>(products);
                if constexpr (F::kMinimums) {
                    int minimums = 0;
                    for (int i = 0; i < kTileColumns / 32; i++) {
                        minimums += low(tile.minimums[i][row]) * rows.sums[t][2 * i] + high(tile.minimums[i][row]) * rows.sums[t][2 * i + 1];
                    }
                    total -= tile.minimum_factors[row] * static_cast<float>(minimums);
                }
                totals[t][row] += total * *rows.scales[t];
            }
        }
    }

    template <class F, int Tokens>
    static void add_blocks(const Tile& tile, int blocks, const TileRows<Tokens>& rows, float (*totals)[kGroupRows]) {
        for (int t = 0; t < Tokens; t++) {
            for (int b = 0; b < blocks; b++) {
                for (int row = 0; row < kGroupRows; row++) {
                    const auto product = static_cast<float>(dot<F>(tile, row, rows.values[t], 8 * b, 8));
                    totals[t][row] += product * tile.block_scales[b][row] * rows.scales[t][b];
                    if constexpr (F::kMinimums) {
                        totals[t][row] += rows.scaled_sums[t][b] * tile.block_offsets[b][row];
                    }
                }
            }
        }
    }

    template <class F, int Tokens>
    static void add_floats(const std::uint8_t* group, std::int64_t k, const float* const* values, float (*totals)[kGroupRows]) {
        for (std::int64_t column = 0; column < k; column++, group += 2 * kGroupRows) {
            for (int row = 0; row < kGroupRows; row++) {
                std::uint16_t bits;
                std::memcpy(&bits, group + 2 * row, 2);
                const float weight = F::kType == GGML_TYPE_BF16 ? ggml_bf16_to_fp32({bits}) : ggml_fp16_to_fp32(bits);
                for (int t = 0; t < Tokens; t++) {
                    totals[t][row] += weight * values[t][column];
                }
            }
        }
    }
};

}  // namespace

const KernelSet portable_kernels = {"portable", find_multiply<Portable>};

}  // namespace llama_moe::experts
