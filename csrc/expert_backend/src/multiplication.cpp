#include "multiplication.h"

namespace llama_moe::experts {
namespace {

// What it costs to unpack weights, in tokens that are multiplied with them.
constexpr std::int64_t kUnpackCost = 3;
// So many parts for each thread, of which the last ones to end are small; but at least so many bytes of weights to a part where threads have one
// each: kernels prefetch beyond its end.
constexpr std::int64_t kPartsOfThread = 16;
constexpr std::int64_t kBytesOfPart = 32768;
// The activations of these stay in the second level of the cache while the groups of a part are multiplied with them.
constexpr int kRowsOfPart = 128;

// An expert's part of some matrices, group after group.
class GroupProducts {
   public:
    GroupProducts(const KernelSet& kernels, const Matrices& matrices, std::int64_t expert, std::int64_t first_group)
        : multiply_(kernels.find(matrices.weights->format().type)),
          group_bytes_(matrices.weights->group_bytes()),
          group_(matrices.weights->locate(expert) + static_cast<std::size_t>(matrices.first_group + first_group) * group_bytes_),
          bias_(matrices.bias ? matrices.bias + expert * matrices.bias_stride + first_group * kGroupRows : nullptr) {}

    void take(const ActivationRows& activations, const std::int32_t* rows, float* const* outputs, int count) {
        multiply_(group_, activations, rows, outputs, count);
        group_ += group_bytes_;
        if (bias_) {
            for (int row = 0; row < count; row++) {
                for (int i = 0; i < kGroupRows; i++) {
                    outputs[row][i] += bias_[i];
                }
            }
            bias_ += kGroupRows;
        }
    }

   private:
    const MultiplyGroup multiply_;
    const std::size_t group_bytes_;
    const std::uint8_t* group_;
    const float* bias_;
};

}  // namespace

void Multiplication::make_parts(const Matrices& matrices, const std::vector<Assignment>& assignments, int threads) {
    const std::int64_t groups = matrices.groups;
    std::int64_t cost = 0;
    for (const auto& assignment : assignments) {
        cost += groups * (kUnpackCost + static_cast<std::int64_t>(assignment.rows.size()));
    }
    const auto group_bytes = static_cast<std::int64_t>(matrices.weights->group_bytes());
    const std::int64_t smallest = std::min(cost / threads, kBytesOfPart / group_bytes * (kUnpackCost + 1));
    const std::int64_t cost_of_part = std::max(cost / (threads * kPartsOfThread), smallest);
    parts_.clear();
    for (const auto& assignment : assignments) {
        const int rows = static_cast<int>(assignment.rows.size());
        for (int first_row = 0; first_row < rows; first_row += kRowsOfPart) {
            const int rows_of_part = std::min(kRowsOfPart, rows - first_row);
            const std::int64_t groups_of_part = std::max<std::int64_t>(1, cost_of_part / (kUnpackCost + rows_of_part));
            for (std::int64_t group = 0; group < groups; group += groups_of_part) {
                parts_.push_back({&assignment, group, std::min(groups_of_part, groups - group), first_row, rows_of_part});
            }
        }
    }
}

template <class Work>
bool Multiplication::for_each_part(int threads, Work work) {
    std::atomic<bool> stopped{should_stop_ && should_stop_()};
    const auto caller = std::this_thread::get_id();
    for_each_in_parallel(threads, static_cast<std::int64_t>(parts_.size()), [&](std::int64_t i) {
        if (!stopped && should_stop_ && std::this_thread::get_id() == caller && should_stop_()) {
            stopped = true;
        }
        if (!stopped) {
            work(parts_[static_cast<std::size_t>(i)]);
        }
    });
    return !stopped;
}

bool Multiplication::run(const Matrices& matrices, const std::vector<Assignment>& assignments, int threads) {
    make_parts(matrices, assignments, threads);
    const ActivationRows activations = activations_.rows();
    return for_each_part(threads, [&](const Part& part) {
        GroupProducts products(kernels_, matrices, part.assignment->expert, part.first_group);
        float* outputs[kRowsOfPart];
        for (std::int64_t group = 0; group < part.groups; group++) {
            for (int row = 0; row < part.rows; row++) {
                outputs[row] = part.output(row, group);
            }
            products.take(activations, part.row_numbers(), outputs, part.rows);
        }
    });
}

bool Multiplication::run_gated(const Matrices& gates, const Matrices& ups, const Glu& glu, const std::vector<Assignment>& assignments, int threads) {
    make_parts(gates, assignments, threads);
    const ActivationRows activations = activations_.rows();
    return for_each_part(threads, [&](const Part& part) {
        GroupProducts gate_products(kernels_, gates, part.assignment->expert, part.first_group);
        GroupProducts up_products(kernels_, ups, part.assignment->expert, part.first_group);
        alignas(64) float gate[kRowsOfPart][kGroupRows];
        alignas(64) float up[kRowsOfPart][kGroupRows];
        alignas(64) float result[kRowsOfPart][kGroupRows];
        float* gate_outputs[kRowsOfPart];
        float* up_outputs[kRowsOfPart];
        for (int row = 0; row < part.rows; row++) {
            gate_outputs[row] = gate[row];
            up_outputs[row] = up[row];
        }
        for (std::int64_t group = 0; group < part.groups; group++) {
            gate_products.take(activations, part.row_numbers(), gate_outputs, part.rows);
            up_products.take(activations, part.row_numbers(), up_outputs, part.rows);
            kernels_.apply_glu(glu, gate[0], up[0], result[0], static_cast<std::int64_t>(part.rows) * kGroupRows);
            for (int row = 0; row < part.rows; row++) {
                std::copy_n(result[row], kGroupRows, part.output(row, group));
            }
        }
    });
}

}  // namespace llama_moe::experts
