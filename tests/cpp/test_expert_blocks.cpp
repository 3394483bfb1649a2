// Whole layers of experts, which the expert backend computes in one go: what it makes of a graph, against the same operations one by one, double
// precision and ggml's CPU backend.
#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <thread>

#include "expert_test_backend.h"
#include "expert_weights.h"
#include "fusion.h"
#include "ggml-alloc.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "test_support.h"

using namespace llama_moe::experts;
using namespace test;

namespace {

// A layer's experts: gate and up projection, activation, down projection, the router's weights and the sum, built as llama.cpp does.
struct Block {
    ggml_type type = GGML_TYPE_Q8_0;
    ggml_glu_op glu = GGML_GLU_OP_SWIGLU;
    std::int64_t size = 512, inner = 256, experts = 4, used = 2, tokens = 3;
    bool merged = false;    // gate and up in one tensor
    bool biased = false;
    bool up_first = false;  // in the graph
    bool dense = false;     // one matrix each, and neither weights nor a sum
};

class BlockGraph {
   public:
    BlockGraph(const Block& block, bool ours) : block_(block) {
        const ggml_init_params params{ggml_tensor_overhead() * 64 + 2 * ggml_graph_overhead(), nullptr, /*no_alloc=*/true};
        weights_context_.reset(ggml_init(params));
        plain_context_.reset(ggml_init(params));
        context_.reset(ggml_init(params));
        const std::int64_t experts = block.dense ? 1 : block.experts;
        const auto make_weights = [&](std::int64_t k, std::int64_t rows) { return ggml_new_tensor_3d(weights_context_.get(), block.type, k, rows, experts); };
        const auto make_bias = [&](std::int64_t rows) { return ggml_new_tensor_2d(plain_context_.get(), GGML_TYPE_F32, rows, experts); };
        gate_ = make_weights(block.size, (block.merged ? 2 : 1) * block.inner);
        up_ = block.merged ? nullptr : make_weights(block.size, block.inner);
        down_ = make_weights(block.inner, block.size);
        if (block.biased) {
            gate_bias_ = make_bias(gate_->ne[1]);
            up_bias_ = block.merged ? nullptr : make_bias(block.inner);
            down_bias_ = make_bias(block.size);
        }
        input_ = ggml_new_tensor_3d(plain_context_.get(), GGML_TYPE_F32, block.size, block.dense ? block.tokens : 1, block.dense ? 1 : block.tokens);
        ids_ = ggml_new_tensor_2d(plain_context_.get(), GGML_TYPE_I32, block.used, block.tokens);
        router_ = ggml_new_tensor_3d(plain_context_.get(), GGML_TYPE_F32, 1, block.used, block.tokens);
        weights_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights_context_.get(), ours ? expert_buffer_type() : ggml_backend_cpu_buffer_type()));
        ggml_backend_buffer_set_usage(weights_buffer_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        plain_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(plain_context_.get(), ggml_backend_cpu_buffer_type()));
        unsigned seed = 1;
        for (ggml_tensor* tensor : {gate_, up_, down_, gate_bias_, up_bias_, down_bias_, input_, router_}) {
            if (tensor) {
                values_[tensor] = fill(tensor, seed++);
            }
        }
        std::mt19937 engine(3);
        chosen_.resize(static_cast<std::size_t>(ggml_nelements(ids_)));
        std::generate(chosen_.begin(), chosen_.end(), [&] { return static_cast<std::int32_t>(engine() % static_cast<unsigned>(experts)); });
        ggml_backend_tensor_set(ids_, chosen_.data(), 0, ggml_nbytes(ids_));
        build();
        // Memory is used again as in llama.cpp.
        allocator_.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
        REQUIRE(ggml_gallocr_alloc_graph(allocator_.get(), graph_));
        backend_ = make_backend(ours, 2);
    }

    static constexpr int kFirst = 2;  // the first node of the block
    ggml_cgraph* graph() { return graph_; }
    ggml_cgraph block() { return ggml_graph_view(graph_, kFirst, graph_->n_nodes); }
    ggml_backend_t backend() { return backend_.get(); }
    ggml_tensor* gated() { return gated_; }

    std::vector<float> compute() { return compute_pieces({graph_->n_nodes}); }
    // With each node by itself.
    std::vector<float> compute_singly() {
        std::vector<int> ends;
        for (int i = 0; i < graph_->n_nodes; i++) {
            ends.push_back(i + 1);
        }
        return compute_pieces(ends);
    }

    std::vector<double> exact() const {
        std::vector<double> result;
        for (std::int64_t token = 0; token < block_.tokens; token++) {
            std::vector<double> sum(static_cast<std::size_t>(block_.size));
            for (std::int64_t i = 0; i < (block_.dense ? 1 : block_.used); i++) {
                const auto expert = block_.dense ? 0 : chosen_[static_cast<std::size_t>(token * block_.used + i)];
                const std::vector<float>& all = values_.at(input_);
                const std::vector<double> input(all.begin() + token * block_.size, all.begin() + (token + 1) * block_.size);
                auto gate = product(gate_, gate_bias_, expert, input);
                const auto up = block_.merged ? std::vector<double>(gate.begin() + block_.inner, gate.end()) : product(up_, up_bias_, expert, input);
                gate.resize(static_cast<std::size_t>(block_.inner));
                for (std::size_t j = 0; j < gate.size(); j++) {
                    gate[j] = activate(gate[j], up[j]);
                }
                const auto down = product(down_, down_bias_, expert, gate);
                const double weight = block_.dense ? 1 : static_cast<double>(values_.at(router_)[static_cast<std::size_t>(token * block_.used + i)]);
                for (std::size_t j = 0; j < sum.size(); j++) {
                    sum[j] += weight * down[j];
                }
            }
            result.insert(result.end(), sum.begin(), sum.end());
        }
        return result;
    }

   private:
    static constexpr float kAlpha = 1.702f, kLimit = 7.0f;

    static std::vector<float> fill(ggml_tensor* tensor, unsigned seed) {
        const auto count = static_cast<std::size_t>(ggml_nelements(tensor));
        const auto bytes = quantised(tensor->type, random_floats(count, seed, ggml_is_quantized(tensor->type) ? 0.1f : 1.0f), tensor->ne[0]);
        ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
        return dequantised(tensor->type, bytes, count);
    }

    void build() {
        ggml_context* ctx = context_.get();
        const auto product = [&](ggml_tensor* weights, ggml_tensor* bias, ggml_tensor* input) {
            ggml_tensor* result = block_.dense ? ggml_mul_mat(ctx, weights, input) : ggml_mul_mat_id(ctx, weights, input, ids_);
            result = bias ? ggml_add_id(ctx, result, bias, ids_) : result;
            ggml_build_forward_expand(graph_, result);
            return result;
        };
        graph_ = ggml_new_graph(ctx);
        // Not leaves: else their memory would not be used again.
        ggml_tensor* input = ggml_scale(ctx, input_, 1.0f);
        ggml_tensor* router = ggml_scale(ctx, router_, 1.0f);
        ggml_build_forward_expand(graph_, input);
        ggml_build_forward_expand(graph_, router);
        ggml_tensor* up = block_.up_first ? product(up_, up_bias_, input) : nullptr;
        ggml_tensor* gate = product(gate_, gate_bias_, input);
        if (block_.merged) {
            const auto half = [&](std::int64_t row) {
                return ggml_view_3d(ctx, gate, block_.inner, gate->ne[1], gate->ne[2], gate->nb[1], gate->nb[2], static_cast<std::size_t>(row) * sizeof(float));
            };
            up = half(block_.inner);
            gate = half(0);
        } else if (!up) {
            up = product(up_, up_bias_, input);
        }
        gated_ = block_.glu == GGML_GLU_OP_SWIGLU_OAI ? ggml_swiglu_oai(ctx, gate, up, kAlpha, kLimit) : ggml_glu_split(ctx, gate, up, block_.glu);
        result_ = product(down_, down_bias_, gated_);
        if (!block_.dense) {
            ggml_tensor* weighted = ggml_mul(ctx, result_, router);
            const auto of_expert = [&](std::int64_t i) {
                return ggml_view_2d(ctx, weighted, block_.size, block_.tokens, weighted->nb[2], static_cast<std::size_t>(i) * weighted->nb[1]);
            };
            result_ = block_.used == 1 ? weighted : of_expert(0);
            for (std::int64_t i = 1; i < block_.used; i++) {
                result_ = ggml_add(ctx, result_, of_expert(i));
            }
        }
        ggml_build_forward_expand(graph_, result_);
    }

    std::vector<float> compute_pieces(const std::vector<int>& ends) {
        for (int i = 0; i < kFirst; i++) {
            const auto& values = values_.at(graph_->nodes[i]->src[0]);
            ggml_backend_tensor_set(graph_->nodes[i], values.data(), 0, values.size() * sizeof(float));
        }
        int first = kFirst;
        for (const int end : ends) {
            if (end > first) {
                ggml_cgraph piece = ggml_graph_view(graph_, first, end);
                REQUIRE(ggml_backend_graph_compute(backend_.get(), &piece) == GGML_STATUS_SUCCESS);
                first = end;
            }
        }
        std::vector<float> result(static_cast<std::size_t>(ggml_nelements(result_)));
        ggml_backend_tensor_get(result_, result.data(), 0, ggml_nbytes(result_));
        return result;
    }

    std::vector<double> product(const ggml_tensor* weights, const ggml_tensor* bias, std::int32_t expert, const std::vector<double>& input) const {
        std::vector<double> result;
        const float* weight = values_.at(weights).data() + expert * weights->ne[1] * weights->ne[0];
        for (std::int64_t row = 0; row < weights->ne[1]; row++) {
            double sum = bias ? static_cast<double>(values_.at(bias)[static_cast<std::size_t>(expert * weights->ne[1] + row)]) : 0;
            for (const double value : input) {
                sum += static_cast<double>(*weight++) * value;
            }
            result.push_back(sum);
        }
        return result;
    }

    double activate(double gate, double up) const {
        const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
        switch (block_.glu) {
            case GGML_GLU_OP_REGLU: return std::max(gate, 0.0) * up;
            case GGML_GLU_OP_GEGLU: return gate * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * gate * (1 + 0.044715 * gate * gate))) / 2 * up;
            case GGML_GLU_OP_GEGLU_QUICK: return gate * sigmoid(1.702 * gate) * up;
            case GGML_GLU_OP_SWIGLU_OAI: {
                const double limited = std::min(gate, static_cast<double>(kLimit));
                return limited * sigmoid(static_cast<double>(kAlpha) * limited) * (std::clamp<double>(up, -kLimit, kLimit) + 1);
            }
            default: return gate * sigmoid(gate) * up;
        }
    }

    const Block block_;
    ggml_context_ptr weights_context_, plain_context_, context_;
    ggml_backend_buffer_ptr weights_buffer_, plain_buffer_;
    ggml_gallocr_ptr allocator_;
    ggml_backend_ptr backend_;
    ggml_tensor *gate_ = nullptr, *up_ = nullptr, *down_ = nullptr, *gate_bias_ = nullptr, *up_bias_ = nullptr, *down_bias_ = nullptr;
    ggml_tensor *input_ = nullptr, *ids_ = nullptr, *router_ = nullptr, *gated_ = nullptr, *result_ = nullptr;
    std::map<const ggml_tensor*, std::vector<float>> values_;
    std::vector<std::int32_t> chosen_;
    ggml_cgraph* graph_ = nullptr;
};

std::string describe(const Block& block) {
    return std::string(ggml_type_name(block.type)) + " " + ggml_glu_op_name(block.glu) + ", " + std::to_string(block.tokens) + " tokens, " +
           std::to_string(block.used) + " used" + (block.merged ? ", merged" : "") + (block.biased ? ", biased" : "") + (block.dense ? ", dense" : "");
}

// Computed in one go it is what its operations give one by one, to the last bit, and that is as exact as with ggml.
void check_block(const Block& block) {
    BlockGraph ours(block, true);
    BlockGraph theirs(block, false);
    const auto together = ours.compute();
    CHECK(together == ours.compute_singly());
    const auto exact = ours.exact();
    const double error = normalised_error(together, exact);
    const double allowed = std::max(1e-10, 1.1 * normalised_error(theirs.compute(), exact));
    if (!(error <= allowed)) {
        test::fail(__FILE__, __LINE__, describe(block) + ": error " + test::show(error) + ", allowed " + test::show(allowed));
    }
}

}  // namespace

TEST_CASE("a layer's experts in one go are what they are one by one, and as exact as with ggml") {
    for (const auto glu : {GGML_GLU_OP_SWIGLU, GGML_GLU_OP_GEGLU, GGML_GLU_OP_GEGLU_QUICK, GGML_GLU_OP_REGLU, GGML_GLU_OP_SWIGLU_OAI}) {
        for (const bool merged : {false, true}) {
            for (const bool biased : {false, true}) {
                Block block;
                block.glu = glu;
                block.merged = merged;
                block.biased = biased;
                check_block(block);
            }
        }
    }
    for (const auto tokens : {1, 2, 40, 150}) {
        for (const auto used : {1, 2, 5}) {
            Block block;
            block.tokens = tokens;
            block.used = used;
            block.up_first = used == 2;
            check_block(block);
        }
    }
    for (const auto type : {GGML_TYPE_Q4_1, GGML_TYPE_Q4_K, GGML_TYPE_BF16}) {
        Block block;
        block.type = type;
        check_block(block);
    }
    Block dense;
    dense.dense = true;
    check_block(dense);
}

TEST_CASE("what is computed in one go is found in a graph") {
    const auto find = [](const Block& block, bool keep_gated) {
        BlockGraph built(block, true);
        ggml_cgraph* graph = built.graph();
        if (keep_gated) {
            ggml_set_output(built.gated()->src[0]);
        }
        const auto gated = find_gated_product(*graph, BlockGraph::kFirst);
        const auto sum = find_weighted_sum(*graph, gated ? gated->last + 1 : BlockGraph::kFirst);
        CHECK(!gated || gated->glu == built.gated());
        CHECK(!sum || sum->last == graph->n_nodes - 1);
        return std::make_pair(gated.has_value(), sum.has_value());
    };
    Block block;
    block.used = 4;
    CHECK(find(block, false) == std::make_pair(true, true));
    CHECK(find(block, true) == std::make_pair(false, false));  // somebody reads the gates
    block.merged = block.biased = true;
    CHECK(find(block, false) == std::make_pair(true, true));
    block.used = 1;
    CHECK(find(block, false) == std::make_pair(true, false));
    block.merged = block.biased = false;
    block.dense = true;
    CHECK(find(block, false) == std::make_pair(true, false));
    block.glu = GGML_GLU_OP_GEGLU_ERF;
    CHECK(find(block, false) == std::make_pair(false, false));
}

TEST_CASE("a graph can be stopped") {
    BlockGraph built(Block(), true);
    ggml_cgraph graph = built.block();
    auto* registry = ggml_backend_dev_backend_reg(expert_device());
    auto set = reinterpret_cast<ggml_backend_set_abort_callback_t>(ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_abort_callback"));
    struct Asked {
        std::thread::id caller = std::this_thread::get_id();
        int left = 2;  // the block has two products
        bool elsewhere = false;
    } asked;
    const auto stop_at_last = [](void* data) {
        auto& asked = *static_cast<Asked*>(data);
        asked.elsewhere |= std::this_thread::get_id() != asked.caller;
        return --asked.left <= 0;
    };
    set(built.backend(), stop_at_last, &asked);
    CHECK(ggml_backend_graph_compute(built.backend(), &graph) == GGML_STATUS_ABORTED);
    CHECK(!asked.elsewhere);
    asked.left = 1000000;
    CHECK(ggml_backend_graph_compute(built.backend(), &graph) == GGML_STATUS_SUCCESS);
    asked.left = 1;
    set(built.backend(), nullptr, nullptr);
    CHECK(ggml_backend_graph_compute(built.backend(), &graph) == GGML_STATUS_SUCCESS);
}
