#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "arrangement.h"
#include "ggml.h"

namespace llama_moe::experts {

// Weights are packed in groups of this many rows: one row for each 32-bit lane of a 512-bit vector.
constexpr int kGroupRows = 16;
// A lane holds this many weights of its row, next to each other along k; a product of two such lanes is one instruction.
constexpr int kStep = 4;

// How many values of a row share a scale of the activations they are multiplied with.
enum class ActivationKind {
    super_blocks,  // 256, as ggml's Q8_K: the weights of a block have integer scales
    blocks,        // 32, as ggml's Q8_0 and Q8_1
    floats,        // not quantised
};

// A part of a block whose granules of all 16 rows lie next to each other once packed.
struct Segment {
    std::size_t offset;   // in ggml's block
    std::size_t size;     // bytes
    std::size_t granule;  // bytes; divides the size
};

// One of ggml's types, packed. A group of 16 rows is as large as the 16 rows were: for each block along k first all granules of
// the first segment, each with its 16 rows, then those of the second, and so on; then the bits of some formats are arranged anew.
// ggml-common.h of ggml has the blocks.
struct Format {
    ggml_type type;
    ActivationKind activations;
    std::int64_t block;       // weights
    std::size_t block_bytes;  // of one row
    std::vector<Segment> segments;
    const Arrangement* arrangement = nullptr;
};

// Null for a type that has no kernels.
const Format* find_format(ggml_type type);

// Whether a matrix of `rows` rows of `k` weights can be packed.
bool packs(const Format& format, std::int64_t k, std::int64_t rows);

// Between ggml's rows, next to each other, and a packed group; `k` weights to a row.
void pack_group(const Format& format, std::int64_t k, const std::uint8_t* rows, std::uint8_t* group);
void unpack_group(const Format& format, std::int64_t k, const std::uint8_t* group, std::uint8_t* rows);

}  // namespace llama_moe::experts
