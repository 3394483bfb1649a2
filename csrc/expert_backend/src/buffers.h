#pragma once

#include "expert_store.h"
#include "format.h"
#include "ggml-backend.h"

namespace llama_moe::experts {

// Whether a tensor is in a buffer of this backend; that of a question about one to come has no memory.
bool is_ours(const ggml_tensor* tensor);

// How a tensor would be packed in such a buffer; null: it would not.
const Format* packable(const ggml_tensor* tensor);

// Null for a tensor that is as ggml has it, and for a view.
const ExpertWeights* packed_weights(const ggml_tensor* tensor);

}  // namespace llama_moe::experts
