#pragma once

#include <optional>

#include "ggml.h"
#include "glu.h"

// The operations of this backend: products with weights in its buffers, and what belongs to these products in a layer's feed-forward block.
// Each can be computed by itself, whatever part of a graph comes in one piece. `computes` of expert_backend.h knows them all.
namespace llama_moe::experts {

// MUL_MAT or MUL_MAT_ID with weights of ours.
bool is_product(const ggml_tensor* op);
// ADD_ID: a product and each expert's bias.
bool is_biased_product(const ggml_tensor* op);
// GLU: both its operands are (parts of) products.
bool is_gated_product(const ggml_tensor* op);
// MUL: experts' products times the router's weights.
bool is_weighted_product(const ggml_tensor* op);
// ADD: one expert's weighted products are added to others'.
bool is_sum_of_experts(const ggml_tensor* op);

// Nothing for a kind that there is no kernel for.
std::optional<Glu> glu_of(const ggml_tensor* op);

// The tensor that has the memory of this one.
inline const ggml_tensor* base_of(const ggml_tensor* tensor) {
    return tensor->view_src ? tensor->view_src : tensor;
}

// Whether it only says how a tensor is looked at.
bool is_view(const ggml_tensor* op);

}  // namespace llama_moe::experts
