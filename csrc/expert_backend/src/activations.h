#pragma once

#include <cstdint>
#include <vector>

#include "format.h"

namespace llama_moe::experts {

// Rows of activations, one after the other.
struct ActivationRows {
    std::int64_t k;
    const float* floats;        // k of a row, where they are not quantised
    const std::int8_t* values;  // k of a row
    const float* scales;        // one for each block of 256 or 32 values
    const float* sums;          // of the rounded values: for super-blocks kSumsOfSuperBlock each, for blocks one each, times its scale
};

// Sums of 16 of the 256 values, and after these the sums of 32.
constexpr int kSumsOfSuperBlock = 16 + 8;

// Rounds a row of `k` values (not for floats).
using RoundRow = void (*)(ActivationKind kind, std::int64_t k, const float* values, std::int8_t* rounded, float* scales, float* sums);

// Rows of activations as the kernels read them. Quantised ones are rounded to 8 bits, with one scale for 256 or 32 values, so that a
// product is as exact as ggml's own.
class Activations {
   public:
    explicit Activations(RoundRow round_row) : round_row_(round_row) {}

    // Makes room for `rows` rows of `k` values. Rows may then be set by several threads.
    void resize(ActivationKind kind, std::int64_t k, std::int64_t rows);
    void set_row(std::int64_t row, const float* values);

    ActivationRows rows() const { return {k_, floats_.data(), values_.data(), scales_.data(), sums_.data()}; }

   private:
    const RoundRow round_row_;
    ActivationKind kind_ = ActivationKind::floats;
    std::int64_t k_ = 0;
    std::int64_t blocks_ = 0;         // of a row
    std::int64_t sums_of_block_ = 1;
    std::vector<float> floats_;
    std::vector<std::int8_t> values_;
    std::vector<float> scales_;
    std::vector<float> sums_;
};

}  // namespace llama_moe::experts
