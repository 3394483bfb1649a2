#include "imatrix_collector.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ggml-backend.h"

namespace llama_moe {
namespace {

// Products of fewer rows say little, and graphs have some that are no products with weights.
constexpr std::int64_t kLeastRows = 16;

// llama.cpp calls a copy for another device "<device>#<name>#<copy>".
std::string weights_name(const ggml_tensor* tensor) {
    const char* begin = std::strchr(tensor->name, '#');
    if (begin == nullptr) {
        return tensor->name;
    }
    const char* end = std::strchr(begin + 1, '#');
    return end == nullptr ? std::string(begin + 1) : std::string(begin + 1, end);
}

void add_squares(const char* row, std::int64_t columns, double* sums) {
    const auto* values = reinterpret_cast<const float*>(row);
    for (std::int64_t i = 0; i < columns; i++) {
        sums[i] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
}

}  // namespace

bool ImatrixCollector::wants(const ggml_tensor* node) const {
    if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const ggml_tensor* inputs = node->src[1];
    if (inputs->type != GGML_TYPE_F32 || inputs->nb[0] != sizeof(float)) {
        return false;
    }
    const std::string name = weights_name(node->src[0]);
    const bool of_layer = name.rfind("blk.", 0) == 0 && name.find(".lora_") == std::string::npos;  // an adapter's are not the model's
    if (node->op == GGML_OP_MUL_MAT_ID) {
        return of_layer && inputs->ne[3] == 1;
    }
    return (of_layer || (output_ && name == "output.weight")) && inputs->ne[1] >= kLeastRows;
}

bool ImatrixCollector::on_node(const ggml_tensor* node, bool ask) {
    if (ask) {
        return error_.empty() && wants(node);
    }
    const ggml_tensor* inputs = node->src[1];
    const auto* data = static_cast<const char*>(inputs->data);
    if (!ggml_backend_buffer_is_host(inputs->buffer)) {
        copied_.resize(ggml_nbytes(inputs));
        ggml_backend_tensor_get(inputs, copied_.data(), 0, copied_.size());
        data = copied_.data();
    }
    node->op == GGML_OP_MUL_MAT_ID ? add_experts(node, data) : add_dense(node, data);
    const std::string name = weights_name(node->src[0]);
    if (name.rfind("blk.", 0) == 0) {
        layer_.store(std::atoi(name.c_str() + 4), std::memory_order_relaxed);
    }
    return error_.empty();
}

ImatrixCollector::Sums& ImatrixCollector::sums_of(const ggml_tensor* weights, std::size_t values, std::size_t counts) {
    Sums& sums = sums_[weights_name(weights)];
    if (sums.values.empty()) {
        sums.values.resize(values);
        sums.counts.resize(counts);
    }
    return sums;
}

// Weights of several matrices (the heads of a latent attention) have one count for all: each sees the same rows.
void ImatrixCollector::add_dense(const ggml_tensor* node, const char* data) {
    const ggml_tensor* weights = node->src[0];
    const ggml_tensor* inputs = node->src[1];
    const std::int64_t columns = inputs->ne[0];
    const std::int64_t matrices = weights->ne[2] * weights->ne[3];
    Sums& sums = sums_of(weights, static_cast<std::size_t>(columns * matrices), 1);
    for (std::int64_t i3 = 0; i3 < inputs->ne[3]; i3++) {
        for (std::int64_t i2 = 0; i2 < inputs->ne[2]; i2++) {
            const std::int64_t matrix = (i3 % weights->ne[3]) * weights->ne[2] + i2 % weights->ne[2];
            const char* rows = data + static_cast<std::size_t>(i2) * inputs->nb[2] + static_cast<std::size_t>(i3) * inputs->nb[3];
            for (std::int64_t i1 = 0; i1 < inputs->ne[1]; i1++) {
                add_squares(rows + static_cast<std::size_t>(i1) * inputs->nb[1], columns, sums.values.data() + matrix * columns);
            }
        }
    }
    sums.counts[0] += static_cast<double>(ggml_nrows(inputs) / matrices);
    if (!std::all_of(sums.values.begin(), sums.values.end(), [](double value) { return std::isfinite(value); })) {
        error_ = "the inputs of '" + weights_name(weights) + "' are not finite numbers";
    }
}

// The inputs are [columns, experts used or 1, tokens], the chosen experts [experts used, tokens].
void ImatrixCollector::add_experts(const ggml_tensor* node, const char* data) {
    const ggml_tensor* weights = node->src[0];
    const ggml_tensor* inputs = node->src[1];
    const ggml_tensor* chosen = node->src[2];
    const std::int64_t columns = inputs->ne[0];
    const std::int64_t experts = weights->ne[2];
    ids_.resize(ggml_nbytes(chosen));
    ggml_backend_tensor_get(chosen, ids_.data(), 0, ids_.size());
    Sums& sums = sums_of(weights, static_cast<std::size_t>(columns * experts), static_cast<std::size_t>(experts));
    for (std::int64_t token = 0; token < inputs->ne[2]; token++) {
        for (std::int64_t slot = 0; slot < chosen->ne[0]; slot++) {
            std::int32_t expert = -1;
            std::memcpy(&expert, ids_.data() + static_cast<std::size_t>(token) * chosen->nb[1] + static_cast<std::size_t>(slot) * chosen->nb[0],
                        sizeof(expert));
            if (expert < 0 || expert >= experts) {
                error_ = "a router chose the expert " + std::to_string(expert) + " of " + std::to_string(experts);
                return;
            }
            const char* row = data + static_cast<std::size_t>(token) * inputs->nb[2] + static_cast<std::size_t>(slot % inputs->ne[1]) * inputs->nb[1];
            add_squares(row, columns, sums.values.data() + expert * columns);
            sums.counts[static_cast<std::size_t>(expert)] += 1.0;
        }
    }
    if (!std::all_of(sums.values.begin(), sums.values.end(), [](double value) { return std::isfinite(value); })) {
        error_ = "the inputs of '" + weights_name(weights) + "' are not finite numbers";
    }
}

std::map<std::string, Imatrix::Entry> ImatrixCollector::entries() const {
    std::map<std::string, Imatrix::Entry> entries;
    for (const auto& [name, sums] : sums_) {
        auto& entry = entries[name];
        std::transform(sums.values.begin(), sums.values.end(), std::back_inserter(entry.sums), [](double value) { return static_cast<float>(value); });
        std::transform(sums.counts.begin(), sums.counts.end(), std::back_inserter(entry.counts), [](double count) { return static_cast<float>(count); });
    }
    return entries;
}

}  // namespace llama_moe
