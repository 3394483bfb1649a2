#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
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

// A matrix of each expert, and what is added to its products.
struct Matrices {
    const ExpertWeights* weights;
    std::int64_t first_group, groups;  // of each expert
    const float* bias = nullptr;       // as many for each expert as a matrix has rows; null: nothing
    std::int64_t bias_stride = 0;      // from one expert's to the next's
};

// Products of experts' weights and activations, with what it needs kept from one to the next. One thread at a time uses it.
class Multiplication {
   public:
    explicit Multiplication(const KernelSet& kernels) : kernels_(kernels), activations_(kernels.round_row) {}

    // Rows of activations for weights of this format; `row(i)` says where row i is. Rounded in parallel.
    template <class Row>
    void set_activations(const Format& format, std::int64_t k, std::int64_t rows, int threads, Row row);
    // Asked before products are computed and now and then meanwhile, by the thread that called; true ends them.
    void set_stop(std::function<bool()> should_stop) { should_stop_ = std::move(should_stop); }

    // For each assignment: output of each row = the expert's matrix times the row. False: stopped before the end.
    bool run(const Matrices& matrices, const std::vector<Assignment>& assignments, int threads);
    // The same with two matrices of one size: the results of the first are gates of the second's.
    bool run_gated(const Matrices& gates, const Matrices& ups, const Glu& glu, const std::vector<Assignment>& assignments, int threads);

   private:
    // Some groups of an expert and some of its rows.
    struct Part {
        const Assignment* assignment;
        std::int64_t first_group, groups;
        int first_row, rows;

        const std::int32_t* row_numbers() const { return assignment->rows.data() + first_row; }
        float* output(int row, std::int64_t group) const {
            return assignment->outputs[static_cast<std::size_t>(first_row + row)] + (first_group + group) * kGroupRows;
        }
    };
    void make_parts(const Matrices& matrices, const std::vector<Assignment>& assignments, int threads);
    template <class Work>
    bool for_each_part(int threads, Work work);

    const KernelSet& kernels_;
    Activations activations_;
    std::vector<Part> parts_;
    std::function<bool()> should_stop_;
};

template <class Row>
void Multiplication::set_activations(const Format& format, std::int64_t k, std::int64_t rows, int threads, Row row) {
    activations_.resize(format.activations, k, rows);
    for_each_row_in_parallel(threads, rows, [&](std::int64_t i) { activations_.set_row(i, row(i)); });
}

}  // namespace llama_moe::experts
