#include "operations.h"

#include <cstring>

#include "buffers.h"
#include "ggml-backend-impl.h"
#include "llama_moe/expert_backend.h"

namespace llama_moe::experts {
namespace {

// Rows of floats that can be read where they are.
bool are_rows(const ggml_tensor* tensor) {
    return tensor && tensor->type == GGML_TYPE_F32 && tensor->nb[0] == sizeof(float);
}

bool is_result(const ggml_tensor* tensor) {
    return is_product(tensor) || is_biased_product(tensor);
}

}  // namespace

bool is_view(const ggml_tensor* op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE: return true;
        default: return false;
    }
}

bool is_product(const ggml_tensor* op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const ggml_tensor* weights = op->src[0];
    if (!is_ours(weights) || !are_rows(op->src[1]) || !are_rows(op) || weights->ne[3] != 1) {
        return false;
    }
    if (weights->view_src && packed_weights(weights->view_src)) {
        return false;  // a part of packed weights: ggml copies it from here, unpacked
    }
    const bool experts = op->op == GGML_OP_MUL_MAT_ID;
    if (experts ? op->src[2]->type != GGML_TYPE_I32 : weights->ne[2] != 1) {
        return false;
    }
    // A buffer without memory comes with the question whether weights should be here. Those that are here can always be used.
    if (weights->buffer->context == nullptr) {
        return packable(weights) && (experts || ggml_is_quantized(weights->type));
    }
    return weights->type == GGML_TYPE_F32 || ggml_get_type_traits(weights->type)->to_float != nullptr;
}

bool is_biased_product(const ggml_tensor* op) {
    return op->op == GGML_OP_ADD_ID && is_product(op->src[0]) && are_rows(op->src[1]) && op->src[1]->ne[2] == 1;
}

std::optional<Glu> glu_of(const ggml_tensor* op) {
    switch (ggml_get_glu_op(op)) {
        case GGML_GLU_OP_SWIGLU: return Glu{Glu::Kind::swiglu};
        case GGML_GLU_OP_GEGLU: return Glu{Glu::Kind::geglu};
        case GGML_GLU_OP_GEGLU_QUICK: return Glu{Glu::Kind::geglu_quick};
        case GGML_GLU_OP_REGLU: return Glu{Glu::Kind::reglu};
        case GGML_GLU_OP_SWIGLU_OAI: {
            float parameters[4];  // two integers, alpha, limit
            static_assert(sizeof parameters <= sizeof op->op_params);
            std::memcpy(parameters, op->op_params, sizeof parameters);
            return Glu{Glu::Kind::swiglu_oai, parameters[2], parameters[3]};
        }
        default: return std::nullopt;
    }
}

bool is_gated_product(const ggml_tensor* op) {
    return op->op == GGML_OP_GLU && glu_of(op) && are_rows(op->src[0]) && are_rows(op->src[1]) && is_result(base_of(op->src[0])) &&
           is_result(base_of(op->src[1]));
}

bool is_weighted_product(const ggml_tensor* op) {
    if (op->op != GGML_OP_MUL || !is_result(op->src[0]) || op->src[0]->src[2] == nullptr) {
        return false;
    }
    const ggml_tensor* weights = op->src[1];
    return weights->type == GGML_TYPE_F32 && weights->ne[0] == 1 && weights->ne[1] == op->ne[1] && weights->ne[2] == op->ne[2] && op->ne[3] == 1 &&
           weights->ne[3] == 1;
}

bool is_sum_of_experts(const ggml_tensor* op) {
    return op->op == GGML_OP_ADD && op->src[1]->view_src && is_weighted_product(op->src[1]->view_src) && are_rows(op->src[0]) &&
           are_rows(op->src[1]) && ggml_are_same_shape(op->src[0], op->src[1]) && op->ne[2] == 1;
}

bool computes(const ggml_tensor* op) {
    return is_view(op) || is_product(op) || is_biased_product(op) || is_gated_product(op) || is_weighted_product(op) || is_sum_of_experts(op);
}

}  // namespace llama_moe::experts
