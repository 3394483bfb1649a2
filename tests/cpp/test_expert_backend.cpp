// The expert backend: products of experts through ggml's interface, against dequantised weights in double precision and against ggml's CPU
// backend; and its buffers.
#include <algorithm>
#include <cstring>
#include <random>

#include "expert_test_backend.h"
#include "expert_weights.h"
#include "ggml.h"
#include "test_support.h"

using namespace llama_moe::experts;
using namespace test;

namespace {

// A product of experts: what to multiply, in the shapes that llama.cpp has.
struct Experts {
    ggml_type type = GGML_TYPE_Q4_K;
    std::int64_t k = 256, rows = 32, experts = 4;
    std::int64_t used = 2, tokens = 3;
    bool row_for_each = false;  // a row of activations for each expert of a token, as for down projections; else one for all
    bool strided = false;       // activations and ids are views of larger tensors
    bool dense = false;         // MUL_MAT instead
    int threads = 2;
};

struct Outcome {
    std::vector<float> result;
    std::vector<double> exact;
};

Outcome compute(const Experts& shape, bool ours) {
    const std::int64_t experts = shape.dense ? 1 : shape.experts;
    const std::int64_t used = shape.dense ? 1 : shape.used;
    const std::int64_t columns = shape.row_for_each ? used : 1;
    const ggml_init_params params{ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, /*no_alloc=*/true};
    const ggml_context_ptr weights_context(ggml_init(params));
    const ggml_context_ptr context(ggml_init(params));
    ggml_tensor* weights = ggml_new_tensor_3d(weights_context.get(), shape.type, shape.k, shape.rows, experts);
    const ggml_backend_buffer_ptr weights_buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(weights_context.get(), ours ? expert_buffer_type() : ggml_backend_cpu_buffer_type()));
    ggml_backend_buffer_set_usage(weights_buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    const auto floats = random_floats(static_cast<std::size_t>(shape.k * shape.rows * experts), 1, 0.1f);
    const auto bytes = quantised(shape.type, floats, shape.k);
    ggml_backend_tensor_set(weights, bytes.data(), 0, bytes.size());

    const std::int64_t extra = shape.strided ? 3 : 0;
    ggml_tensor* all_activations = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, shape.k + extra * 8, columns, shape.tokens);
    ggml_tensor* all_ids = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, used + extra, shape.tokens);
    ggml_tensor* activations = ggml_view_3d(context.get(), all_activations, shape.k, columns, shape.tokens, all_activations->nb[1],
                                            all_activations->nb[2], 0);
    ggml_tensor* ids = ggml_view_2d(context.get(), all_ids, used, shape.tokens, all_ids->nb[1], 0);
    ggml_tensor* product = shape.dense ? ggml_mul_mat(context.get(), weights, activations) : ggml_mul_mat_id(context.get(), weights, activations, ids);
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
    const auto values = random_floats(static_cast<std::size_t>(ggml_nelements(all_activations)), 2);
    ggml_backend_tensor_set(all_activations, values.data(), 0, values.size() * sizeof(float));
    // The last expert is used by nobody, and a token has one twice where it has more than two.
    std::mt19937 engine(3);
    std::vector<std::int32_t> chosen(static_cast<std::size_t>(ggml_nelements(all_ids)), -1);
    for (std::int64_t token = 0; token < shape.tokens; token++) {
        for (std::int64_t i = 0; i < used; i++) {
            chosen[static_cast<std::size_t>(token * (used + extra) + i)] =
                i == 2 ? chosen[static_cast<std::size_t>(token * (used + extra))]
                       : static_cast<std::int32_t>(engine() % static_cast<unsigned>(std::max<std::int64_t>(1, experts - 1)));
        }
    }
    ggml_backend_tensor_set(all_ids, chosen.data(), 0, chosen.size() * sizeof(std::int32_t));

    const auto backend = make_backend(ours, shape.threads);
    REQUIRE(ggml_backend_supports_op(backend.get(), product));
    ggml_cgraph* graph = ggml_new_graph(context.get());
    ggml_build_forward_expand(graph, product);
    REQUIRE(ggml_backend_graph_compute(backend.get(), graph) == GGML_STATUS_SUCCESS);

    Outcome outcome;
    outcome.result.resize(static_cast<std::size_t>(ggml_nelements(product)));
    ggml_backend_tensor_get(product, outcome.result.data(), 0, ggml_nbytes(product));
    const auto exact_weights = dequantised(shape.type, bytes, floats.size());
    for (std::int64_t token = 0; token < shape.tokens; token++) {
        for (std::int64_t i = 0; i < used; i++) {
            const auto expert = shape.dense ? 0 : chosen[static_cast<std::size_t>(token * (used + extra) + i)];
            const float* row = values.data() + (token * columns + i % columns) * (shape.k + extra * 8);
            for (std::int64_t r = 0; r < shape.rows; r++) {
                const float* weight = exact_weights.data() + (expert * shape.rows + r) * shape.k;
                double sum = 0;
                for (std::int64_t j = 0; j < shape.k; j++) {
                    sum += static_cast<double>(weight[j]) * static_cast<double>(row[j]);
                }
                outcome.exact.push_back(sum);
            }
        }
    }
    return outcome;
}

// As exact as ggml's own kernels, give or take a tenth. Below the floor both are as exact as floats are.
void check_as_exact_as_ggml(const Experts& shape, const std::string& what) {
    constexpr double kFloor = 1e-10;
    const auto ours = compute(shape, true);
    const auto theirs = compute(shape, false);
    const double error = normalised_error(ours.result, ours.exact);
    const double allowed = std::max(kFloor, 1.1 * normalised_error(theirs.result, theirs.exact));
    if (!(error <= allowed)) {
        test::fail(__FILE__, __LINE__, what + ": error " + test::show(error) + ", allowed " + test::show(allowed));
    }
}

std::string describe(const Experts& shape) {
    return std::string(ggml_type_name(shape.type)) + " " + std::to_string(shape.k) + " x " + std::to_string(shape.rows) + ", " +
           std::to_string(shape.experts) + " experts, " + std::to_string(shape.used) + " used, " + std::to_string(shape.tokens) + " tokens";
}

}  // namespace

TEST_CASE("products of experts are as exact as ggml's, in every format") {
    for (const auto type : formats()) {
        for (const auto tokens : {1, 5, 40}) {
            Experts shape;
            shape.type = type;
            shape.k = 512;
            shape.tokens = tokens;
            check_as_exact_as_ggml(shape, describe(shape));
            shape.row_for_each = true;
            check_as_exact_as_ggml(shape, describe(shape) + ", a row for each");
        }
    }
}

TEST_CASE("products of experts are as exact as ggml's, in many shapes") {
    for (const auto type : {GGML_TYPE_Q4_K, GGML_TYPE_Q5_0, GGML_TYPE_Q8_0}) {
        Experts shape;
        shape.type = type;
        const auto check = [](const Experts& changed) { check_as_exact_as_ggml(changed, describe(changed)); };
        for (const auto tokens : {1, 2, 3, 17, 64, 130, 512}) {
            shape.tokens = tokens;
            check(shape);
        }
        shape.tokens = 9;
        for (const auto experts : {1, 2, 7, 128, 512}) {
            shape.experts = experts;
            shape.used = std::min<std::int64_t>(experts, 6);
            check(shape);
        }
        shape.experts = 8;
        for (const auto rows : {16, 48, 112}) {
            shape.rows = rows;
            check(shape);
        }
        shape.strided = true;
        shape.row_for_each = true;
        for (const auto threads : {1, 2, 5}) {
            shape.threads = threads;
            check(shape);
        }
    }
    Experts shape;  // columns that fill no tile
    shape.type = GGML_TYPE_Q5_0;
    for (const auto k : {32, 96, 288, 1408}) {
        shape.k = k;
        check_as_exact_as_ggml(shape, describe(shape));
    }
}

TEST_CASE("dense products are as exact as ggml's") {
    for (const auto type : formats()) {
        Experts shape;
        shape.type = type;
        shape.dense = true;
        shape.tokens = 33;
        check_as_exact_as_ggml(shape, describe(shape) + ", dense");
    }
}

TEST_CASE("weights that have no kernels are multiplied as well where llama.cpp puts them beside ours") {
    for (const bool dense : {false, true}) {
        Experts shape;
        shape.type = GGML_TYPE_F32;
        shape.rows = 5;
        shape.k = 48;
        shape.dense = dense;
        check_as_exact_as_ggml(shape, describe(shape));
        shape.type = GGML_TYPE_F16;
        check_as_exact_as_ggml(shape, describe(shape));
    }
}

TEST_CASE("packed weights are written and read in pieces") {
    for (const auto type : formats()) {
        const std::int64_t k = 256;
        const std::int64_t rows = 48;
        const ggml_init_params params{ggml_tensor_overhead() * 8, nullptr, /*no_alloc=*/true};
        const ggml_context_ptr context(ggml_init(params));
        ggml_tensor* weights = ggml_new_tensor_3d(context.get(), type, k, rows, 3);
        const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), expert_buffer_type()));
        CHECK(ggml_backend_buffer_get_size(buffer.get()) <= ggml_nbytes(weights) + 64);
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        std::vector<std::uint8_t> bytes(ggml_nbytes(weights));
        std::mt19937 engine(7);
        std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<std::uint8_t>(engine()); });
        for (std::size_t at = 0; at < bytes.size();) {
            const std::size_t size = std::min<std::size_t>(bytes.size() - at, 1 + engine() % 9000);
            ggml_backend_tensor_set(weights, bytes.data() + at, at, size);
            at += size;
        }
        std::vector<std::uint8_t> read(bytes.size());
        ggml_backend_tensor_get(weights, read.data(), 0, read.size());
        CHECK(read == bytes);
        CHECK(std::memcmp(weights->data, bytes.data(), bytes.size()) != 0);
        std::vector<std::uint8_t> part(777);
        ggml_backend_tensor_get(weights, part.data(), 1000, part.size());
        CHECK(std::equal(part.begin(), part.end(), bytes.begin() + 1000));

        // A view has its part of the bytes, and is not multiplied with as if it were packed.
        const std::size_t from = 17 * weights->nb[1];
        ggml_tensor* rows_of_first = ggml_view_2d(context.get(), weights, k, 5, weights->nb[1], from);
        REQUIRE(ggml_backend_view_init(rows_of_first) == GGML_STATUS_SUCCESS);
        std::vector<std::uint8_t> viewed(ggml_nbytes(rows_of_first));
        ggml_backend_tensor_get(rows_of_first, viewed.data(), 0, viewed.size());
        CHECK(std::equal(viewed.begin(), viewed.end(), bytes.begin() + static_cast<std::ptrdiff_t>(from)));
        ggml_tensor* activations = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, k);
        CHECK(!ggml_backend_dev_supports_op(expert_device(), ggml_mul_mat(context.get(), rows_of_first, activations)));
    }
}
