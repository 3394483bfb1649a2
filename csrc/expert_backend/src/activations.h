#pragma once

#include <cstdint>
#include <vector>

#include "format.h"

namespace llama_moe::experts {

// Sums of the 256 rounded values of a super-block. Integers are for kernels that multiply pairs of 16 bits.
struct SumsOfSuperBlock {
    float of_16[16], of_32[8];
    std::int16_t integers_of_16[16], integers_of_32[8];
    std::int16_t halves_of_16[16][2];  // of 16 values: of the first two of each four, and of the last two
};

// Rows of activations, one after the other.
struct ActivationRows {
    std::int64_t k;
    const float* floats;        // k of a row, where they are not quantised
    const std::int8_t* values;  // k of a row
    const float* scales;        // one for each block of 256 or 32 values
    const float* sums;          // of blocks: one of the rounded values each, times its scale
    const SumsOfSuperBlock* sums_of_super_blocks;
};

// Where a rounded row goes.
struct RoundedRow {
    std::int8_t* values;
    float* scales;
    float* sums;
    SumsOfSuperBlock* sums_of_super_blocks;
};

// Rounds a row of `k` values (not for floats).
using RoundRow = void (*)(ActivationKind kind, std::int64_t k, const float* values, const RoundedRow& to);

// Rows of activations as the kernels read them. Quantised ones are rounded to 8 bits, with one scale for 256 or 32 values, so that a
// product is as exact as ggml's own.
class Activations {
   public:
    explicit Activations(RoundRow round_row) : round_row_(round_row) {}

    // Makes room for `rows` rows of `k` values. Rows may then be set by several threads.
    void resize(ActivationKind kind, std::int64_t k, std::int64_t rows);
    void set_row(std::int64_t row, const float* values);

    ActivationRows rows() const { return {k_, floats_.data(), values_.data(), scales_.data(), sums_.data(), sums_of_super_blocks_.data()}; }

   private:
    const RoundRow round_row_;
    ActivationKind kind_ = ActivationKind::floats;
    std::int64_t k_ = 0;
    std::int64_t blocks_ = 0;  // of a row
    std::vector<float> floats_;
    std::vector<std::int8_t> values_;
    std::vector<float> scales_;
    std::vector<float> sums_;
    std::vector<SumsOfSuperBlock> sums_of_super_blocks_;
};

}  // namespace llama_moe::experts
