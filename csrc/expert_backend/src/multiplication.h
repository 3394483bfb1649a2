#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "expert_store.h"
#include "kernels.h"
#include "threads.h"

namespace llama_moe::experts {

// Rows of activations that one expert is multiplied with, and where each result goes.
struct Assignment {
    std::int64_t expert;
    std::vector<std::int32_t> rows;
    std::vector<float*> outputs;
};

// Products of experts' weights and activations, with what it needs kept from one to the next. One thread at a time uses it.
class Multiplication {
   public:
    explicit Multiplication(const KernelSet& kernels) : kernels_(kernels) {}

    // Rows of activations for weights of this format; `row(i)` says where row i is. Rounded in parallel.
    template <class Row>
    void set_activations(const Format& format, std::int64_t k, std::int64_t rows, int threads, Row row);
    // For each assignment: output of each row = the expert's matrix times the row.
    void run(const ExpertWeights& weights, const std::vector<Assignment>& assignments, int threads);

   private:
    // Some groups of an expert and some of its rows.
    struct Part {
        const Assignment* assignment;
        std::int64_t first_group, groups;
        int first_row, rows;
    };

    const KernelSet& kernels_;
    Activations activations_;
    std::vector<Part> parts_;
};

template <class Row>
void Multiplication::set_activations(const Format& format, std::int64_t k, std::int64_t rows, int threads, Row row) {
    activations_.resize(format.activations, k, rows);
    // A few rows are rounded sooner than other threads have begun.
    constexpr std::int64_t kRowsOfThread = 4;
    const int used = static_cast<int>(std::min<std::int64_t>(threads, (rows + kRowsOfThread - 1) / kRowsOfThread));
    for_each_in_parallel(used, rows, [&](std::int64_t i) { activations_.set_row(i, row(i)); });
}

}  // namespace llama_moe::experts
