#pragma once

#include <cstdint>

#include "format.h"

// What kernels share: weights of 16 rows and up to 256 columns, unpacked to bytes in the first level of the cache, and how each format gets
// there. Written in terms of vectors of 64 bytes (`Bytes` of an `Arch`), so that it is the same for all processors; the loops over 16 rows
// are simple enough for compilers to make vectors of.
namespace llama_moe::experts {
namespace {  // each processor's kernels have a copy of their own, compiled for it, which must not be taken for another's

constexpr int kTileColumns = 256;

struct alignas(64) Tile {
    std::uint8_t weights[kTileColumns / kStep][64];  // [step][4 x row + column in the step]
    // Of super-blocks: the sum of products of 16 or 32 columns is multiplied with an integer scale; then sums of the activations of 16
    // columns with integer minimums are subtracted. Each word has two 16-bit numbers, as they are multiplied with sums of two neighbours: a
    // scale twice, the minimums of two times 16 columns.
    std::uint32_t scales[kTileColumns / 16][kGroupRows];
    std::uint32_t minimums[kTileColumns / 32][kGroupRows];
    float factors[kGroupRows];          // of the scales
    float minimum_factors[kGroupRows];  // of the minimums
    // Of blocks of 32 columns: product x scale + sum of activations x offset.
    float block_scales[kTileColumns / 32][kGroupRows];
    float block_offsets[kTileColumns / 32][kGroupRows];
};

inline std::uint32_t twice(int number) {
    const auto half = static_cast<std::uint32_t>(static_cast<std::uint16_t>(number));
    return half | half << 16;
}

inline std::uint32_t pair(int first, int second) {
    return static_cast<std::uint32_t>(static_cast<std::uint16_t>(first)) | static_cast<std::uint32_t>(static_cast<std::uint16_t>(second)) << 16;
}

// The values of IQ4_NL and IQ4_XS (kvalues_iq4nl), and of MXFP4 (kvalues_mxfp4) raised by 12 so that none is negative.
constexpr std::int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr std::int8_t kMxfp4Values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Of every format: kType; kBytes, of a row's block; kSub, the columns of a scale, 0 for floats; kSuperBlock; kLargest, the largest
// unpacked weight, which says how many products fit into 16 bits; kSigned, whether weights have a sign (then Arch::kOffset is added);
// kMinimums, whether minimums or offsets are used; unpack(), which fills a tile from packed blocks.

// Nibbles of a block of 32: low ones are the first half of the columns, high ones the second.
template <class Arch, class Map>
inline void unpack_nibbles(const std::uint8_t* quants, std::uint8_t (*weights)[64], Map map) {
    using Bytes = typename Arch::Bytes;
    for (int step = 0; step < 4; step++) {
        const Bytes both = Arch::load(quants + 64 * step);
        Arch::store(weights[step], map(Arch::low_nibbles(both), step, 0));
        Arch::store(weights[step + 4], map(Arch::high_nibbles(both), step, 1));
    }
}

struct Q4_0 {
    static constexpr ggml_type kType = GGML_TYPE_Q4_0;
    static constexpr int kBytes = 18, kSub = 32, kLargest = 15;
    static constexpr bool kSuperBlock = false, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int blocks, Tile& tile) {
        for (int b = 0; b < blocks; b++, group += kBytes * kGroupRows) {
            unpack_nibbles<Arch>(group, tile.weights + 8 * b, [](auto nibbles, int, int) { return nibbles; });
            Arch::to_floats(group + 256, tile.block_scales[b]);
            for (int row = 0; row < kGroupRows; row++) {
                tile.block_offsets[b][row] = -8 * tile.block_scales[b][row];
            }
        }
    }
};

struct Q4_1 {
    static constexpr ggml_type kType = GGML_TYPE_Q4_1;
    static constexpr int kBytes = 20, kSub = 32, kLargest = 15;
    static constexpr bool kSuperBlock = false, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int blocks, Tile& tile) {
        for (int b = 0; b < blocks; b++, group += kBytes * kGroupRows) {
            unpack_nibbles<Arch>(group, tile.weights + 8 * b, [](auto nibbles, int, int) { return nibbles; });
            Arch::to_floats(group + 256, tile.block_scales[b]);
            Arch::to_floats(group + 288, tile.block_offsets[b]);
        }
    }
};

// Adds the fifth bits of Q5_0 and Q5_1: bit 2 x step, and the next for the upper half, of each byte.
template <class Arch>
inline void unpack_five_bits(const std::uint8_t* group, std::uint8_t (*weights)[64]) {
    const auto high = Arch::load(group + 256);
    unpack_nibbles<Arch>(group, weights, [&](auto nibbles, int step, int half) {
        return Arch::bit_or(nibbles, Arch::bits(high, 2 * step + half, 1, 4));
    });
}

struct Q5_0 {
    static constexpr ggml_type kType = GGML_TYPE_Q5_0;
    static constexpr int kBytes = 22, kSub = 32, kLargest = 31;
    static constexpr bool kSuperBlock = false, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int blocks, Tile& tile) {
        for (int b = 0; b < blocks; b++, group += kBytes * kGroupRows) {
            unpack_five_bits<Arch>(group, tile.weights + 8 * b);
            Arch::to_floats(group + 320, tile.block_scales[b]);
            for (int row = 0; row < kGroupRows; row++) {
                tile.block_offsets[b][row] = -16 * tile.block_scales[b][row];
            }
        }
    }
};

struct Q5_1 {
    static constexpr ggml_type kType = GGML_TYPE_Q5_1;
    static constexpr int kBytes = 24, kSub = 32, kLargest = 31;
    static constexpr bool kSuperBlock = false, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int blocks, Tile& tile) {
        for (int b = 0; b < blocks; b++, group += kBytes * kGroupRows) {
            unpack_five_bits<Arch>(group, tile.weights + 8 * b);
            Arch::to_floats(group + 320, tile.block_scales[b]);
            Arch::to_floats(group + 352, tile.block_offsets[b]);
        }
    }
};

// With Arch::kOffset weights are stored raised by 128, and that much of the activations is taken off again.
template <class Arch>
inline void offset_signed(Tile& tile, int b) {
    if constexpr (Arch::kOffset != 0) {
        for (int row = 0; row < kGroupRows; row++) {
            tile.block_offsets[b][row] = -Arch::kOffset * tile.block_scales[b][row];
        }
    }
}

struct Q8_0 {
    static constexpr ggml_type kType = GGML_TYPE_Q8_0;
    static constexpr int kBytes = 34, kSub = 32, kLargest = 128;
    static constexpr bool kSuperBlock = false, kSigned = true, kMinimums = false;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int blocks, Tile& tile) {
        for (int b = 0; b < blocks; b++, group += kBytes * kGroupRows) {
            for (int step = 0; step < 8; step++) {
                Arch::store(tile.weights[8 * b + step], Arch::raise(Arch::load(group + 64 * step)));
            }
            Arch::to_floats(group + 512, tile.block_scales[b]);
            offset_signed<Arch>(tile, b);
        }
    }
};

struct Iq4Nl {
    static constexpr ggml_type kType = GGML_TYPE_IQ4_NL;
    static constexpr int kBytes = 18, kSub = 32, kLargest = 127;
    static constexpr bool kSuperBlock = false, kSigned = true, kMinimums = false;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int blocks, Tile& tile) {
        const auto values = Arch::table(kIq4Values);
        for (int b = 0; b < blocks; b++, group += kBytes * kGroupRows) {
            unpack_nibbles<Arch>(group, tile.weights + 8 * b, [&](auto nibbles, int, int) { return Arch::raise(Arch::look_up(values, nibbles)); });
            Arch::to_floats(group + 256, tile.block_scales[b]);
            offset_signed<Arch>(tile, b);
        }
    }
};

struct Mxfp4 {
    static constexpr ggml_type kType = GGML_TYPE_MXFP4;
    static constexpr int kBytes = 17, kSub = 32, kLargest = 24;
    static constexpr bool kSuperBlock = false, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int blocks, Tile& tile) {
        const auto values = Arch::table(kMxfp4Values);
        for (int b = 0; b < blocks; b++, group += kBytes * kGroupRows) {
            unpack_nibbles<Arch>(group, tile.weights + 8 * b, [&](auto nibbles, int, int) { return Arch::look_up(values, nibbles); });
            for (int row = 0; row < kGroupRows; row++) {
                tile.block_scales[b][row] = half_of_power(group[256 + row]);
                tile.block_offsets[b][row] = -12 * tile.block_scales[b][row];
            }
        }
    }

    // 2^(exponent - 128): the values are twice those of E2M1.
    static float half_of_power(std::uint8_t exponent) {
        const std::uint32_t bits = exponent < 2 ? 0x00200000u << exponent : static_cast<std::uint32_t>(exponent - 1) << 23;
        float power;
        static_assert(sizeof power == sizeof bits);
        __builtin_memcpy(&power, &bits, sizeof power);
        return power;
    }
};

struct Q2_K {
    static constexpr ggml_type kType = GGML_TYPE_Q2_K;
    static constexpr int kBytes = 84, kSub = 16, kLargest = 3;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int, Tile& tile) {
        for (int half = 0; half < 2; half++) {
            for (int step = 0; step < 8; step++) {
                const auto quants = Arch::load(group + 64 * (8 * half + step));
                for (int j = 0; j < 4; j++) {
                    Arch::store(tile.weights[32 * half + 8 * j + step], Arch::bits(quants, 2 * j, 2, 0));
                }
            }
        }
        const std::uint8_t* scales = group + 1024;
        for (int sub = 0; sub < 16; sub += 2) {
            for (int row = 0; row < kGroupRows; row++) {
                const int first = scales[16 * sub + row];
                const int second = scales[16 * sub + 16 + row];
                tile.scales[sub][row] = twice(first & 15);
                tile.scales[sub + 1][row] = twice(second & 15);
                tile.minimums[sub / 2][row] = pair(first >> 4, second >> 4);
            }
        }
        Arch::to_floats(group + 1280, tile.factors);
        Arch::to_floats(group + 1312, tile.minimum_factors);
    }
};

struct Q3_K {
    static constexpr ggml_type kType = GGML_TYPE_Q3_K;
    static constexpr int kBytes = 110, kSub = 16, kLargest = 7;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int, Tile& tile) {
        const std::uint8_t* quants = group + 512;
        for (int step = 0; step < 8; step++) {
            const auto high = Arch::load(group + 64 * step);
            for (int half = 0; half < 2; half++) {
                const auto low = Arch::load(quants + 64 * (8 * half + step));
                for (int j = 0; j < 4; j++) {
                    Arch::store(tile.weights[32 * half + 8 * j + step], Arch::bit_or(Arch::bits(low, 2 * j, 2, 0), Arch::bits(high, 4 * half + j, 1, 2)));
                }
            }
        }
        // 6 bits each: four in the first eight bytes, as nibbles, two in the last four.
        const std::uint8_t* scales = group + 1536;
        for (int sub = 0; sub < 16; sub += 2) {
            for (int row = 0; row < kGroupRows; row++) {
                int numbers[2];
                for (int i = 0; i < 2; i++) {
                    const int s = sub + i;
                    const int low = s < 8 ? scales[16 * s + row] & 15 : scales[16 * (s - 8) + row] >> 4;
                    numbers[i] = (low | ((scales[16 * (8 + s % 4) + row] >> (2 * (s / 4))) & 3) << 4) - 32;
                    tile.scales[s][row] = twice(numbers[i]);
                }
                tile.minimums[sub / 2][row] = pair(4 * numbers[0], 4 * numbers[1]);
            }
        }
        Arch::to_floats(group + 1728, tile.factors);
        Arch::to_floats(group + 1728, tile.minimum_factors);
    }
};

// Scales and minimums of Q4_K and Q5_K: 6 bits each in 12 bytes.
inline void unpack_six_bits(const std::uint8_t* bytes, Tile& tile) {
    for (int sub = 0; sub < 4; sub++) {
        for (int row = 0; row < kGroupRows; row++) {
            const int scale = bytes[16 * sub + row];
            const int minimum = bytes[16 * (sub + 4) + row];
            const int rest = bytes[16 * (sub + 8) + row];
            tile.scales[sub][row] = twice(scale & 63);
            tile.minimums[sub][row] = twice(minimum & 63);
            tile.scales[sub + 4][row] = twice((rest & 15) | (scale >> 6) << 4);
            tile.minimums[sub + 4][row] = twice((rest >> 4) | (minimum >> 6) << 4);
        }
    }
}

struct Q4_K {
    static constexpr ggml_type kType = GGML_TYPE_Q4_K;
    static constexpr int kBytes = 144, kSub = 32, kLargest = 15;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int, Tile& tile) {
        for (int j = 0; j < 4; j++) {
            for (int step = 0; step < 8; step++) {
                const auto both = Arch::load(group + 64 * (8 * j + step));
                Arch::store(tile.weights[16 * j + step], Arch::low_nibbles(both));
                Arch::store(tile.weights[16 * j + 8 + step], Arch::high_nibbles(both));
            }
        }
        unpack_six_bits(group + 2048, tile);
        Arch::to_floats(group + 2240, tile.factors);
        Arch::to_floats(group + 2272, tile.minimum_factors);
    }
};

struct Q5_K {
    static constexpr ggml_type kType = GGML_TYPE_Q5_K;
    static constexpr int kBytes = 176, kSub = 32, kLargest = 31;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int, Tile& tile) {
        const std::uint8_t* quants = group + 512;
        for (int step = 0; step < 8; step++) {
            const auto high = Arch::load(group + 64 * step);
            for (int j = 0; j < 4; j++) {
                const auto both = Arch::load(quants + 64 * (8 * j + step));
                Arch::store(tile.weights[16 * j + step], Arch::bit_or(Arch::low_nibbles(both), Arch::bits(high, 2 * j, 1, 4)));
                Arch::store(tile.weights[16 * j + 8 + step], Arch::bit_or(Arch::high_nibbles(both), Arch::bits(high, 2 * j + 1, 1, 4)));
            }
        }
        unpack_six_bits(group + 2560, tile);
        Arch::to_floats(group + 2752, tile.factors);
        Arch::to_floats(group + 2784, tile.minimum_factors);
    }
};

struct Q6_K {
    static constexpr ggml_type kType = GGML_TYPE_Q6_K;
    static constexpr int kBytes = 210, kSub = 16, kLargest = 63;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int, Tile& tile) {
        for (int half = 0; half < 2; half++) {
            for (int step = 0; step < 8; step++) {
                const auto first = Arch::load(group + 64 * (16 * half + step));
                const auto second = Arch::load(group + 64 * (16 * half + 8 + step));
                const auto high = Arch::load(group + 2048 + 64 * (8 * half + step));
                std::uint8_t(*weights)[64] = tile.weights + 32 * half + step;
                Arch::store(weights[0], Arch::bit_or(Arch::low_nibbles(first), Arch::bits(high, 0, 2, 4)));
                Arch::store(weights[8], Arch::bit_or(Arch::low_nibbles(second), Arch::bits(high, 2, 2, 4)));
                Arch::store(weights[16], Arch::bit_or(Arch::high_nibbles(first), Arch::bits(high, 4, 2, 4)));
                Arch::store(weights[24], Arch::bit_or(Arch::high_nibbles(second), Arch::bits(high, 6, 2, 4)));
            }
        }
        const auto* scales = reinterpret_cast<const std::int8_t*>(group + 3072);
        for (int sub = 0; sub < 16; sub += 2) {
            for (int row = 0; row < kGroupRows; row++) {
                const int first = scales[16 * sub + row];
                const int second = scales[16 * sub + 16 + row];
                tile.scales[sub][row] = twice(first);
                tile.scales[sub + 1][row] = twice(second);
                tile.minimums[sub / 2][row] = pair(32 * first, 32 * second);
            }
        }
        Arch::to_floats(group + 3328, tile.factors);
        Arch::to_floats(group + 3328, tile.minimum_factors);
    }
};

struct Iq4Xs {
    static constexpr ggml_type kType = GGML_TYPE_IQ4_XS;
    static constexpr int kBytes = 136, kSub = 32, kLargest = 127;
    static constexpr bool kSuperBlock = true, kSigned = true, kMinimums = false;

    template <class Arch>
    static void unpack(const std::uint8_t* group, int, Tile& tile) {
        const auto values = Arch::table(kIq4Values);
        for (int sub = 0; sub < 8; sub++) {
            unpack_nibbles<Arch>(group + 256 * sub, tile.weights + 8 * sub,
                                 [&](auto nibbles, int, int) { return Arch::raise(Arch::look_up(values, nibbles)); });
        }
        const std::uint8_t* high = group + 2048;
        const std::uint8_t* low = group + 2080;
        for (int sub = 0; sub < 8; sub++) {
            for (int row = 0; row < kGroupRows; row++) {
                const int two = (high[16 * (sub / 4) + row] >> (2 * (sub % 4))) & 3;
                const int number = (((low[16 * (sub / 2) + row] >> (4 * (sub % 2))) & 15) | two << 4) - 32;
                tile.scales[sub][row] = twice(number);
                if constexpr (Arch::kOffset != 0) {
                    tile.minimums[sub][row] = twice(Arch::kOffset * number);
                }
            }
        }
        Arch::to_floats(group + 2144, tile.factors);
        Arch::to_floats(group + 2144, tile.minimum_factors);
    }
};

struct F16 {
    static constexpr ggml_type kType = GGML_TYPE_F16;
    static constexpr int kSub = 0;
};

struct Bf16 {
    static constexpr ggml_type kType = GGML_TYPE_BF16;
    static constexpr int kSub = 0;
};

}  // namespace
}  // namespace llama_moe::experts
