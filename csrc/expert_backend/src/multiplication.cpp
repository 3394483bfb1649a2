#include "multiplication.h"

#include <algorithm>

namespace llama_moe::experts {
namespace {

// What it costs to unpack weights, in tokens that are multiplied with them.
constexpr std::int64_t kUnpackCost = 3;
// So many parts for each thread: the last ones to end are small.
constexpr std::int64_t kPartsOfThread = 8;
// The activations of these stay in the second level of the cache while the groups of a part are multiplied with them.
constexpr int kRowsOfPart = 128;

}  // namespace

void Multiplication::run(const ExpertWeights& weights, const std::vector<Assignment>& assignments, int threads) {
    std::int64_t cost = 0;
    for (const auto& assignment : assignments) {
        cost += weights.groups() * (kUnpackCost + static_cast<std::int64_t>(assignment.rows.size()));
    }
    const std::int64_t cost_of_part = std::max<std::int64_t>(1, cost / (threads * kPartsOfThread));
    parts_.clear();
    for (const auto& assignment : assignments) {
        const int rows = static_cast<int>(assignment.rows.size());
        for (int first_row = 0; first_row < rows; first_row += kRowsOfPart) {
            const int rows_of_part = std::min(kRowsOfPart, rows - first_row);
            const std::int64_t groups_of_part = std::max<std::int64_t>(1, cost_of_part / (kUnpackCost + rows_of_part));
            for (std::int64_t group = 0; group < weights.groups(); group += groups_of_part) {
                parts_.push_back({&assignment, group, std::min(groups_of_part, weights.groups() - group), first_row, rows_of_part});
            }
        }
    }
    const MultiplyGroup multiply = kernels_.find(weights.format().type);
    const ActivationRows activations = activations_.rows();
    for_each_in_parallel(threads, static_cast<std::int64_t>(parts_.size()), [&](std::int64_t i) {
        const Part& part = parts_[static_cast<std::size_t>(i)];
        float* outputs[kRowsOfPart];
        for (int row = 0; row < part.rows; row++) {
            outputs[row] = part.assignment->outputs[static_cast<std::size_t>(part.first_row + row)] + part.first_group * kGroupRows;
        }
        const std::uint8_t* group = weights.locate(part.assignment->expert) + static_cast<std::size_t>(part.first_group) * weights.group_bytes();
        for (std::int64_t g = 0; g < part.groups; g++, group += weights.group_bytes()) {
            multiply(group, activations, part.assignment->rows.data() + part.first_row, outputs, part.rows);
            for (int row = 0; row < part.rows; row++) {
                outputs[row] += kGroupRows;
            }
        }
    });
}

}  // namespace llama_moe::experts
