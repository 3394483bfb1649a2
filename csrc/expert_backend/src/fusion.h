#pragma once

#include <optional>

#include "operations.h"

// Parts of a graph that are computed in one go. Their intermediate results are not kept: nothing else uses them, and everything between the
// first node and the last belongs to the part, so that no memory changes hands in between.
namespace llama_moe::experts {

// A product, and the operation that adds the experts' biases to it, if there is one.
struct Product {
    const ggml_tensor* node = nullptr;
    const ggml_tensor* biased = nullptr;

    const ggml_tensor* result() const { return biased ? biased : node; }
};

// Gate and up projection, and the activation. Both may be halves of one product.
struct GatedProduct {
    Product gate, up;
    std::int64_t gate_row, up_row;  // the first one in the product's matrices
    const ggml_tensor* glu;
    int last;  // node of the graph
};

// The down projection, the router's weights, and the sum over the experts.
struct WeightedSum {
    Product down;
    const ggml_tensor* weighted;
    const ggml_tensor* sum;
    int last;
};

// What begins with node `first` of a graph.
std::optional<GatedProduct> find_gated_product(const ggml_cgraph& graph, int first);
std::optional<WeightedSum> find_weighted_sum(const ggml_cgraph& graph, int first);

}  // namespace llama_moe::experts
