#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace llama_moe::experts {

// The packed weights of one tensor, expert by expert; a dense matrix is a single expert. Kernels ask it where an expert is.
class ExpertWeights {
   public:
    // In memory that somebody else owns: `experts` matrices of `rows` rows of `k` weights.
    ExpertWeights(const Format& format, std::int64_t k, std::int64_t rows, std::int64_t experts, std::uint8_t* memory);

    const Format& format() const { return *format_; }
    std::int64_t k() const { return k_; }
    std::int64_t rows() const { return rows_; }
    std::int64_t experts() const { return experts_; }
    std::int64_t groups() const { return rows_ / kGroupRows; }  // of an expert
    std::size_t group_bytes() const { return group_bytes_; }
    std::size_t expert_bytes() const { return static_cast<std::size_t>(groups()) * group_bytes_; }

    // The groups of an expert, next to each other; null for one that is not resident.
    const std::uint8_t* locate(std::int64_t expert) const { return memory_ + static_cast<std::size_t>(expert) * expert_bytes(); }

    // Packs rows that lie as ggml has them, from row `first` of all the experts' rows on; whole groups. In parallel.
    void place(std::int64_t first, std::int64_t rows, const std::uint8_t* from);
    // The same rows as ggml has them.
    void read_back(std::int64_t first, std::int64_t rows, std::uint8_t* to) const;

   private:
    std::uint8_t* group(std::int64_t first_row) const { return memory_ + static_cast<std::size_t>(first_row / kGroupRows) * group_bytes_; }

    const Format* format_;
    std::int64_t k_;
    std::int64_t rows_;
    std::int64_t experts_;
    std::size_t group_bytes_;
    std::uint8_t* memory_;
};

}  // namespace llama_moe::experts
