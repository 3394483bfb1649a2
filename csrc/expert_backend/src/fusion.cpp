#include "fusion.h"

#include <cstdint>

#include "buffers.h"
#include "ggml-impl.h"

namespace llama_moe::experts {
namespace {

// The nodes of a graph that compute, one after the other.
class Nodes {
   public:
    Nodes(const ggml_cgraph& graph, int first) : graph_(graph), next_(first) { skip_views(); }

    const ggml_tensor* peek() const { return next_ < graph_.n_nodes ? graph_.nodes[next_] : nullptr; }
    const ggml_tensor* take() {
        const ggml_tensor* node = peek();
        last_ = next_++;
        skip_views();
        return node;
    }
    int last() const { return last_; }  // the one taken last

   private:
    void skip_views() {
        while (next_ < graph_.n_nodes && is_view(graph_.nodes[next_])) {
            next_++;
        }
    }

    const ggml_cgraph& graph_;
    int next_;
    int last_ = -1;
};

// Also by what is not in this piece of the graph.
int uses(const ggml_cgraph& graph, const ggml_tensor* tensor) {
    const std::size_t position = ggml_hash_find(&graph.visited_hash_set, tensor);
    const bool known = position != GGML_HASHSET_FULL && ggml_bitset_get(graph.visited_hash_set.used, position);
    return known && (tensor->flags & GGML_TENSOR_FLAG_OUTPUT) == 0 ? graph.use_counts[position] : -1;
}

std::optional<Product> take_product(const ggml_cgraph& graph, Nodes& nodes) {
    if (!nodes.peek() || !is_product(nodes.peek()) || !packed_weights(nodes.peek()->src[0])) {
        return std::nullopt;
    }
    Product product;
    product.node = nodes.take();
    const ggml_tensor* next = nodes.peek();
    if (next && is_biased_product(next) && next->src[0] == product.node && next->src[2] == product.node->src[2] && uses(graph, product.node) == 1) {
        product.biased = nodes.take();
    }
    return product;
}

// Which row of the product's matrices a view of all its results begins with.
std::int64_t first_row(const ggml_tensor* view) {
    return static_cast<std::int64_t>(view->view_offs / sizeof(float));
}

bool are_halves(const ggml_tensor* gate, const ggml_tensor* up, const ggml_tensor* whole) {
    const auto is_part = [&](const ggml_tensor* part) {
        return part->op == GGML_OP_VIEW && part->view_src == whole && part->ne[1] == whole->ne[1] && part->ne[2] == whole->ne[2] &&
               part->nb[1] == whole->nb[1] && part->nb[2] == whole->nb[2] && first_row(part) + part->ne[0] <= whole->ne[0] &&
               first_row(part) % kGroupRows == 0;
    };
    return is_part(gate) && is_part(up) && gate->ne[0] % kGroupRows == 0;
}

bool overlap(const ggml_tensor* one, const ggml_tensor* other) {
    const auto* a = static_cast<const char*>(one->data);
    const auto* b = static_cast<const char*>(other->data);
    return a < b + ggml_nbytes(other) && b < a + ggml_nbytes(one);
}

}  // namespace

std::optional<GatedProduct> find_gated_product(const ggml_cgraph& graph, int first) {
    Nodes nodes(graph, first);
    const auto one = take_product(graph, nodes);
    if (!one) {
        return std::nullopt;
    }
    const auto other = take_product(graph, nodes);
    const ggml_tensor* glu = nodes.take();
    if (!glu || !is_gated_product(glu)) {
        return std::nullopt;
    }
    const ggml_tensor* gate = glu->src[0];
    const ggml_tensor* up = glu->src[1];
    if (!other) {
        if (!are_halves(gate, up, one->result()) || uses(graph, one->result()) != 2 || uses(graph, gate) != 1 || uses(graph, up) != 1) {
            return std::nullopt;
        }
        return GatedProduct{*one, *one, first_row(gate), first_row(up), glu, nodes.last()};
    }
    const bool gate_first = gate == one->result() && up == other->result();
    if (!gate_first && (gate != other->result() || up != one->result())) {
        return std::nullopt;
    }
    const bool same_operands = one->node->op == other->node->op && one->node->src[1] == other->node->src[1] && one->node->src[2] == other->node->src[2];
    const bool same_rounding = packed_weights(one->node->src[0])->format().activations == packed_weights(other->node->src[0])->format().activations;
    if (!same_operands || !same_rounding || uses(graph, gate) != 1 || uses(graph, up) != 1) {
        return std::nullopt;
    }
    return GatedProduct{gate_first ? *one : *other, gate_first ? *other : *one, 0, 0, glu, nodes.last()};
}

std::optional<WeightedSum> find_weighted_sum(const ggml_cgraph& graph, int first) {
    Nodes nodes(graph, first);
    const auto down = take_product(graph, nodes);
    const ggml_tensor* weighted = down ? nodes.take() : nullptr;
    if (!weighted || !is_weighted_product(weighted) || weighted->src[0] != down->result() || uses(graph, down->result()) != 1) {
        return std::nullopt;
    }
    const std::int64_t used = weighted->ne[1];
    if (used < 2 || uses(graph, weighted) != used) {
        return std::nullopt;
    }
    // The products of the i-th expert of each token.
    const auto is_of_expert = [&](const ggml_tensor* view, std::int64_t i) {
        return view->view_src == weighted && view->view_offs == static_cast<std::size_t>(i) * weighted->nb[1] && view->nb[1] == weighted->nb[2] &&
               view->ne[0] == weighted->ne[0] && view->ne[1] == weighted->ne[2] && uses(graph, view) == 1;
    };
    const ggml_tensor* sum = nullptr;
    for (std::int64_t i = 1; i < used; i++) {
        const ggml_tensor* add = nodes.take();
        const bool goes_on = add && is_sum_of_experts(add) && is_of_expert(add->src[1], i) &&
                             (i == 1 ? is_of_expert(add->src[0], 0) : add->src[0] == sum && uses(graph, sum) == 1);
        if (!goes_on) {
            return std::nullopt;
        }
        sum = add;
    }
    // The products of all experts are still read when the first sums are written.
    if (overlap(sum, weighted)) {
        return std::nullopt;
    }
    return WeightedSum{*down, weighted, sum, nodes.last()};
}

}  // namespace llama_moe::experts
