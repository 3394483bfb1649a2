#include "format.h"

#include <algorithm>
#include <cstring>

namespace llama_moe::experts {
namespace {

using Kind = ActivationKind;

// In the order in which kernels read them, so that processors see memory read from its beginning to its end: of super-blocks first the scales,
// byte by byte, so that those of 16 rows are a vector, then the quants.
const std::vector<Format>& formats() {
    static const std::vector<Format> all = {
        {GGML_TYPE_Q4_0, Kind::blocks, 32, 18, {{2, 16, 4}, {0, 2, 2}}},
        {GGML_TYPE_Q4_1, Kind::blocks, 32, 20, {{4, 16, 4}, {0, 4, 2}}},
        {GGML_TYPE_Q5_0, Kind::blocks, 32, 22, {{6, 16, 4}, {2, 4, 4}, {0, 2, 2}}, &arrangement_of_q5},
        {GGML_TYPE_Q5_1, Kind::blocks, 32, 24, {{8, 16, 4}, {4, 4, 4}, {0, 4, 2}}, &arrangement_of_q5},
        {GGML_TYPE_Q8_0, Kind::blocks, 32, 34, {{2, 32, 4}, {0, 2, 2}}},
        {GGML_TYPE_IQ4_NL, Kind::blocks, 32, 18, {{2, 16, 4}, {0, 2, 2}}},
        {GGML_TYPE_MXFP4, Kind::blocks, 32, 17, {{1, 16, 4}, {0, 1, 1}}},
        {GGML_TYPE_Q2_K, Kind::super_blocks, 256, 84, {{0, 16, 1}, {80, 4, 2}, {16, 64, 4}}},
        {GGML_TYPE_Q3_K, Kind::super_blocks, 256, 110, {{96, 12, 1}, {108, 2, 2}, {0, 32, 4}, {32, 64, 4}}, &arrangement_of_q3_k},
        {GGML_TYPE_Q4_K, Kind::super_blocks, 256, 144, {{4, 12, 1}, {0, 4, 2}, {16, 128, 4}}},
        {GGML_TYPE_Q5_K, Kind::super_blocks, 256, 176, {{4, 12, 1}, {0, 4, 2}, {16, 32, 4}, {48, 128, 4}}, &arrangement_of_q5_k},
        {GGML_TYPE_Q6_K, Kind::super_blocks, 256, 210, {{192, 16, 1}, {208, 2, 2}, {0, 16, 4}, {32, 16, 4}, {128, 16, 4}, {16, 16, 4}, {48, 16, 4}, {144, 16, 4},
                                                   {64, 16, 4}, {96, 16, 4}, {160, 16, 4}, {80, 16, 4}, {112, 16, 4}, {176, 16, 4}}, &arrangement_of_q6_k},
        {GGML_TYPE_IQ4_XS, Kind::super_blocks, 256, 136, {{2, 2, 1}, {4, 4, 1}, {0, 2, 2}, {8, 128, 4}}},
        {GGML_TYPE_F16, Kind::floats, 16, 32, {{0, 32, 2}}},
        {GGML_TYPE_BF16, Kind::floats, 16, 32, {{0, 32, 2}}},
    };
    return all;
}

// to[column][row] = from[row][column], of elements that lie next to each other in a row of either; strides are bytes. In squares of four,
// of which compilers make shuffles of vectors.
template <class Element>
void transpose(const std::uint8_t* from, std::size_t from_stride, std::size_t rows, std::size_t columns, std::uint8_t* to, std::size_t to_stride) {
    constexpr std::size_t kSize = sizeof(Element);
    for (std::size_t row = 0; row < rows; row += 4) {
        for (std::size_t column = 0; column < columns; column += 4) {
            const std::size_t high = std::min<std::size_t>(4, rows - row);
            const std::size_t wide = std::min<std::size_t>(4, columns - column);
            const std::uint8_t* corner = from + row * from_stride + column * kSize;
            std::uint8_t* turned = to + column * to_stride + row * kSize;
            if (high == 4 && wide == 4) {
                Element in[4][4];
                for (std::size_t i = 0; i < 4; i++) {
                    std::memcpy(in[i], corner + i * from_stride, 4 * kSize);
                }
                for (std::size_t i = 0; i < 4; i++) {
                    const Element out[4] = {in[0][i], in[1][i], in[2][i], in[3][i]};
                    std::memcpy(turned + i * to_stride, out, 4 * kSize);
                }
                continue;
            }
            for (std::size_t r = 0; r < high; r++) {
                for (std::size_t c = 0; c < wide; c++) {
                    std::memcpy(turned + c * to_stride + r * kSize, corner + r * from_stride + c * kSize, kSize);
                }
            }
        }
    }
}

void transpose(std::size_t granule, const std::uint8_t* from, std::size_t from_stride, std::size_t rows, std::size_t columns, std::uint8_t* to,
               std::size_t to_stride) {
    const auto turn = granule == 1 ? transpose<std::uint8_t> : granule == 2 ? transpose<std::uint16_t> : transpose<std::uint32_t>;
    turn(from, from_stride, rows, columns, to, to_stride);
}

// Asks the memory for a part of the next rows while these are packed: a group is 16 streams of short reads, too many to be guessed.
void prefetch(const std::uint8_t* from, std::size_t bytes) {
    constexpr std::size_t kLine = 64;
    for (std::size_t offset = 0; offset < bytes; offset += kLine) {
        __builtin_prefetch(from + offset);
    }
}

}  // namespace

const Format* find_format(ggml_type type) {
    const auto& all = formats();
    const auto found = std::find_if(all.begin(), all.end(), [&](const Format& format) { return format.type == type; });
    return found == all.end() ? nullptr : &*found;
}

bool packs(const Format& format, std::int64_t k, std::int64_t rows) {
    return k > 0 && rows > 0 && k % format.block == 0 && rows % kGroupRows == 0;
}

void pack_group(const Format& format, std::int64_t k, const std::uint8_t* rows, std::uint8_t* group) {
    const auto blocks = static_cast<std::size_t>(k / format.block);
    const std::size_t row_bytes = blocks * format.block_bytes;
    for (std::size_t b = 0; b < blocks; b++) {
        prefetch(rows + kGroupRows * (row_bytes + b * format.block_bytes), kGroupRows * format.block_bytes);
        std::uint8_t* block = group;
        for (const auto& segment : format.segments) {
            transpose(segment.granule, rows + b * format.block_bytes + segment.offset, row_bytes, kGroupRows, segment.size / segment.granule, group,
                      kGroupRows * segment.granule);
            group += kGroupRows * segment.size;
        }
        if (format.arrangement) {
            format.arrangement->arrange(block);
        }
    }
}

void unpack_group(const Format& format, std::int64_t k, const std::uint8_t* group, std::uint8_t* rows) {
    const auto blocks = static_cast<std::size_t>(k / format.block);
    const std::size_t row_bytes = blocks * format.block_bytes;
    std::vector<std::uint8_t> block(kGroupRows * format.block_bytes);
    for (std::size_t b = 0; b < blocks; b++, group += block.size()) {
        std::memcpy(block.data(), group, block.size());
        if (format.arrangement) {
            format.arrangement->restore(block.data());
        }
        const std::uint8_t* from = block.data();
        for (const auto& segment : format.segments) {
            transpose(segment.granule, from, kGroupRows * segment.granule, segment.size / segment.granule, kGroupRows,
                      rows + b * format.block_bytes + segment.offset, row_bytes);
            from += kGroupRows * segment.size;
        }
    }
}

}  // namespace llama_moe::experts
