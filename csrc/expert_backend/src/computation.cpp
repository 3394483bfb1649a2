#include "computation.h"

#include "buffers.h"
#include "ggml-impl.h"
#include "llama_moe/expert_backend.h"

namespace llama_moe::experts {
namespace {

template <class T = float>
T* at(const ggml_tensor* tensor, std::int64_t i0, std::int64_t i1, std::int64_t i2, std::int64_t i3 = 0) {
    return reinterpret_cast<T*>(static_cast<char*>(tensor->data) + static_cast<std::size_t>(i0) * tensor->nb[0] +
                                static_cast<std::size_t>(i1) * tensor->nb[1] + static_cast<std::size_t>(i2) * tensor->nb[2] +
                                static_cast<std::size_t>(i3) * tensor->nb[3]);
}

float* row_of(const ggml_tensor* tensor, std::int64_t i) {
    return at(tensor, 0, i % tensor->ne[1], i / tensor->ne[1] % tensor->ne[2], i / (tensor->ne[1] * tensor->ne[2]));
}

void add(const float* a, const float* b, float* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i++) {
        to[i] = a[i] + b[i];
    }
}

void scale(const float* values, float factor, float* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i++) {
        to[i] = values[i] * factor;
    }
}

void add_scaled(const float* values, float factor, float* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i++) {
        to[i] += values[i] * factor;
    }
}

// A product's weights from a row of each expert's matrix on, and the bias.
Matrices matrices_of(const Product& product, std::int64_t first_row, std::int64_t rows) {
    Matrices matrices{packed_weights(product.node->src[0]), first_row / kGroupRows, rows / kGroupRows};
    if (product.biased) {
        matrices.bias = at(product.biased->src[1], first_row, 0, 0);
        matrices.bias_stride = static_cast<std::int64_t>(product.biased->src[1]->nb[1] / sizeof(float));
    }
    return matrices;
}

}  // namespace

bool Computation::compute(const ggml_cgraph& graph) {
    for (int i = 0; i < graph.n_nodes; i++) {
        ggml_tensor* node = graph.nodes[i];
        if (is_view(node) || ggml_is_empty(node) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
            continue;
        }
        const auto gated = find_gated_product(graph, i);
        const auto sum = gated ? std::nullopt : find_weighted_sum(graph, i);
        const int last = gated ? gated->last : sum ? sum->last : i;
        for (int shown = i; shown <= last; shown++) {
            Observer::show(graph.nodes[shown]);
        }
        if (!(gated ? compute(*gated) : sum ? compute(*sum) : compute(node))) {
            return false;
        }
        i = last;
    }
    return true;
}

// Calls work(row's number) for each row of a tensor, in parallel.
template <class Work>
void Computation::for_each_row(const ggml_tensor* tensor, Work work) const {
    for_each_row_in_parallel(threads_, ggml_nrows(tensor), work);
}

bool Computation::compute(ggml_tensor* node) {
    const std::int64_t columns = node->ne[0];
    switch (node->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID: return multiply(node);
        case GGML_OP_ADD_ID:
            for_each_row(node, [&](std::int64_t i) {
                const auto expert = *at<std::int32_t>(node->src[2], i % node->ne[1], i / node->ne[1], 0);
                add(row_of(node->src[0], i), at(node->src[1], 0, expert, 0), row_of(node, i), columns);
            });
            break;
        case GGML_OP_GLU: {
            const Glu glu = *glu_of(node);
            for_each_row(node, [&](std::int64_t i) {
                kernels_.apply_glu(glu, row_of(node->src[0], i), row_of(node->src[1], i), row_of(node, i), columns);
            });
            break;
        }
        case GGML_OP_MUL:
            for_each_row(node, [&](std::int64_t i) { scale(row_of(node->src[0], i), *row_of(node->src[1], i), row_of(node, i), columns); });
            break;
        case GGML_OP_ADD:
            for_each_row(node, [&](std::int64_t i) { add(row_of(node->src[0], i), row_of(node->src[1], i), row_of(node, i), columns); });
            break;
        default: GGML_ABORT("the expert backend has no %s", ggml_op_name(node->op));
    }
    return true;
}

bool Computation::compute(const GatedProduct& block) {
    const ggml_tensor* node = block.gate.node;
    round_activations(node);
    assign(node, block.glu);
    const std::int64_t rows = block.glu->ne[0];
    return multiplication_.run_gated(matrices_of(block.gate, block.gate_row, rows), matrices_of(block.up, block.up_row, rows), *glu_of(block.glu),
                                     assignments_, threads_);
}

bool Computation::compute(const WeightedSum& block) {
    const ggml_tensor* products = block.weighted;
    const std::int64_t used = products->ne[1];
    // Their memory may be that of the sum.
    router_weights_.resize(static_cast<std::size_t>(ggml_nrows(products)));
    for (std::size_t i = 0; i < router_weights_.size(); i++) {
        router_weights_[i] = *row_of(block.weighted->src[1], static_cast<std::int64_t>(i));
    }
    round_activations(block.down.node);
    assign(block.down.node, products);
    if (!multiplication_.run(matrices_of(block.down, 0, products->ne[0]), assignments_, threads_)) {
        return false;
    }
    for_each_row(block.sum, [&](std::int64_t token) {
        const float* factors = router_weights_.data() + token * used;
        float* sum = row_of(block.sum, token);
        scale(at(products, 0, 0, token), factors[0], sum, products->ne[0]);
        for (std::int64_t i = 1; i < used; i++) {
            add_scaled(at(products, 0, i, token), factors[i], sum, products->ne[0]);
        }
    });
    return true;
}

bool Computation::multiply(const ggml_tensor* product) {
    assign(product, product);
    if (packed_weights(product->src[0])) {
        round_activations(product);
        return multiplication_.run(matrices_of({product}, 0, product->ne[0]), assignments_, threads_);
    }
    multiply_plain(product->src[0], product->src[1]);
    return true;
}

void Computation::round_activations(const ggml_tensor* product) {
    const ExpertWeights* weights = packed_weights(product->src[0]);
    multiplication_.set_activations(weights->format(), weights->k(), ggml_nrows(product->src[1]), threads_,
                                    [&](std::int64_t i) { return row_of(product->src[1], i); });
}

// Which rows of a product's activations each expert has, and where the results go: rows of a tensor of the product's shape, or with as many.
void Computation::assign(const ggml_tensor* product, const ggml_tensor* output) {
    const ggml_tensor* ids = product->src[2];
    const std::int64_t experts = product->src[0]->ne[2];
    // One for every expert, without rows where nobody uses it; cleared vectors keep their memory.
    assignments_.resize(static_cast<std::size_t>(experts));
    for (std::int64_t e = 0; e < experts; e++) {
        auto& assignment = assignments_[static_cast<std::size_t>(e)];
        assignment.expert = e;
        assignment.rows.clear();
        assignment.outputs.clear();
    }
    const auto add = [&](std::int64_t expert, std::int64_t row, std::int64_t to) {
        auto& assignment = assignments_[static_cast<std::size_t>(expert)];
        assignment.rows.push_back(static_cast<std::int32_t>(row));
        assignment.outputs.push_back(row_of(output, to));
    };
    if (product->op == GGML_OP_MUL_MAT) {
        for (std::int64_t i = 0; i < ggml_nrows(product); i++) {
            add(0, i, i);
        }
        return;
    }
    const std::int64_t rows_of_token = product->src[1]->ne[1];
    for (std::int64_t token = 0; token < ids->ne[1]; token++) {
        for (std::int64_t used = 0; used < ids->ne[0]; used++) {
            const std::int64_t expert = *at<const std::int32_t>(ids, used, token, 0);
            GGML_ASSERT(expert >= 0 && expert < experts);
            add(expert, token * rows_of_token + used % rows_of_token, token * ids->ne[0] + used);
        }
    }
}

// Weights that are as ggml has them: small ones, those of adapters.
void Computation::multiply_plain(const ggml_tensor* weights, const ggml_tensor* activations) {
    const std::int64_t k = weights->ne[0];
    const std::int64_t rows = weights->ne[1];
    const auto to_float = ggml_get_type_traits(weights->type)->to_float;
    in_parallel(threads_, [&](int thread, int all) {
        std::vector<float> converted(weights->type == GGML_TYPE_F32 ? 0 : static_cast<std::size_t>(k));
        for (const auto& assignment : assignments_) {
            for (std::int64_t row = rows * thread / all; row < rows * (thread + 1) / all && !assignment.rows.empty(); row++) {
                const float* numbers = at(weights, 0, row, assignment.expert);
                if (!converted.empty()) {
                    to_float(numbers, converted.data(), k);
                    numbers = converted.data();
                }
                for (std::size_t i = 0; i < assignment.rows.size(); i++) {
                    assignment.outputs[i][row] = kernels_.dot(numbers, row_of(activations, assignment.rows[i]), k);
                }
            }
        }
    });
}

}  // namespace llama_moe::experts
