// Every format's packing, and the kernels of all processors that can run here: those of this one and, in a build of tests/kernels, emulated ones.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "activations.h"
#include "expert_weights.h"
#include "kernels.h"
#include "test_support.h"

using namespace llama_moe::experts;
using namespace test;

#if defined(LLAMA_MOE_EMULATED_KERNELS)
namespace llama_moe::experts {
extern const KernelSet emulated_avx512_kernels, emulated_avx_vnni_kernels;
}
#endif

namespace {

std::vector<KernelSet> tested_kernels() {
    std::vector<KernelSet> kernels = usable_kernels();
#if defined(LLAMA_MOE_EMULATED_KERNELS)
    kernels.push_back(emulated_avx512_kernels);
    kernels.push_back(emulated_avx_vnni_kernels);
#endif
    return kernels;
}

}  // namespace

TEST_CASE("packing moves every byte and unpacking moves it back") {
    std::mt19937 engine(4);
    for (const auto type : formats()) {
        const Format& format = *find_format(type);
        const std::int64_t k = 2 * std::max<std::int64_t>(format.block, 32);
        std::vector<std::uint8_t> rows(ggml_row_size(type, k) * kGroupRows);
        std::generate(rows.begin(), rows.end(), [&] { return static_cast<std::uint8_t>(engine()); });
        std::vector<std::uint8_t> packed(rows.size());
        std::vector<std::uint8_t> unpacked(rows.size());
        pack_group(format, k, rows.data(), packed.data());
        unpack_group(format, k, packed.data(), unpacked.data());
        CHECK(packed != rows);
        CHECK(unpacked == rows);
        auto one = packed;
        auto other = rows;
        if (format.arrangement == nullptr) {
            std::sort(one.begin(), one.end());
            std::sort(other.begin(), other.end());
            CHECK(one == other);
        }
    }
}

TEST_CASE("all of a processor's kernels agree with the portable ones") {
    REQUIRE(std::string(usable_kernels().back().name) == "portable");
    for (const auto& kernels : tested_kernels()) {
        for (const auto type : formats()) {
            const Format& format = *find_format(type);
            // An odd number of blocks, so that the last tile is not full where blocks are small.
            const std::int64_t k = 3 * std::max<std::int64_t>(format.block, 32) + (format.block == 16 ? 16 : 0);
            const auto bytes = quantised(type, random_floats(static_cast<std::size_t>(k * kGroupRows), 5), k);
            std::vector<std::uint8_t> packed(bytes.size());
            pack_group(format, k, bytes.data(), packed.data());
            for (const int tokens : {1, 2, 3, 4, 7, 12, 64, 67}) {
                const auto values = random_floats(static_cast<std::size_t>(k * tokens), 6);
                Activations activations(kernels.round_row);
                activations.resize(format.activations, k, tokens);
                std::vector<std::int32_t> rows;
                for (std::int32_t i = 0; i < tokens; i++) {
                    activations.set_row(i, values.data() + i * k);
                    rows.push_back(tokens - 1 - i);
                }
                const auto multiply = [&](const KernelSet& set) {
                    std::vector<float> result(static_cast<std::size_t>(tokens * kGroupRows));
                    std::vector<float*> outputs;
                    for (int i = 0; i < tokens; i++) {
                        outputs.push_back(result.data() + i * kGroupRows);
                    }
                    set.find(type)(packed.data(), activations.rows(), rows.data(), outputs.data(), tokens);
                    return result;
                };
                const auto found = multiply(kernels);
                // What a token gives does not depend on what is computed beside it.
                for (int i = 0; i < tokens; i++) {
                    std::vector<float> alone(kGroupRows);
                    float* output = alone.data();
                    kernels.find(type)(packed.data(), activations.rows(), &rows[static_cast<std::size_t>(i)], &output, 1);
                    CHECK(std::equal(alone.begin(), alone.end(), found.begin() + i * kGroupRows));
                }
                const auto portable = multiply(portable_kernels);
                const std::vector<double> expected(portable.begin(), portable.end());
                const double error = normalised_error(found, expected);
                if (!(error < 1e-11)) {
                    fail(__FILE__, __LINE__, std::string(kernels.name) + " " + ggml_type_name(type) + ": error " + show(error));
                }
            }
        }
    }
}

TEST_CASE("the largest and smallest weights and activations do not overflow") {
    for (const auto& kernels : tested_kernels()) {
        for (const auto type : formats()) {
            const Format& format = *find_format(type);
            const std::int64_t k = 256;
            for (const float weight : {1.0f, -1.0f}) {
                auto bytes = quantised(type, std::vector<float>(static_cast<std::size_t>(k * kGroupRows), weight), k);
                if (type == GGML_TYPE_Q8_0) {  // no quantiser writes it, but a file may have it
                    for (std::size_t i = 0; i < bytes.size(); i++) {
                        bytes[i] = i % 34 < 2 ? bytes[i] : 0x80;
                    }
                }
                const auto weights = dequantised(type, bytes, static_cast<std::size_t>(k * kGroupRows));
                std::vector<std::uint8_t> packed(bytes.size());
                pack_group(format, k, bytes.data(), packed.data());
                for (const float sign : {1.0f, -1.0f}) {
                    Activations activations(kernels.round_row);
                    activations.resize(format.activations, k, 1);
                    activations.set_row(0, std::vector<float>(static_cast<std::size_t>(k), sign).data());
                    std::vector<float> result(kGroupRows);
                    float* output = result.data();
                    const std::int32_t row = 0;
                    kernels.find(type)(packed.data(), activations.rows(), &row, &output, 1);
                    std::vector<double> exact;
                    for (std::size_t r = 0; r < kGroupRows; r++) {
                        double sum = 0;
                        for (std::size_t j = 0; j < static_cast<std::size_t>(k); j++) {
                            sum += sign * static_cast<double>(weights[r * static_cast<std::size_t>(k) + j]);
                        }
                        exact.push_back(sum);
                    }
                    if (!(normalised_error(result, exact) < 1e-6)) {
                        fail(__FILE__, __LINE__, std::string(kernels.name) + " " + ggml_type_name(type));
                    }
                }
            }
        }
    }
}

TEST_CASE("activations that are not finite give products that are not") {
    for (const auto& kernels : tested_kernels()) {
        for (const auto type : formats()) {
            const Format& format = *find_format(type);
            const std::int64_t k = 512;
            const auto bytes = quantised(type, random_floats(static_cast<std::size_t>(k * kGroupRows), 5), k);
            std::vector<std::uint8_t> packed(bytes.size());
            pack_group(format, k, bytes.data(), packed.data());
            for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
                auto values = random_floats(static_cast<std::size_t>(k), 6);
                values[300] = value;
                Activations activations(kernels.round_row);
                activations.resize(format.activations, k, 1);
                activations.set_row(0, values.data());
                std::vector<float> result(kGroupRows);
                float* output = result.data();
                const std::int32_t row = 0;
                kernels.find(type)(packed.data(), activations.rows(), &row, &output, 1);
                if (!std::none_of(result.begin(), result.end(), [](float x) { return std::isfinite(x); })) {
                    fail(__FILE__, __LINE__, std::string(kernels.name) + " " + ggml_type_name(type));
                }
            }
        }
    }
}

TEST_CASE("sums of products are those of double precision, of any number of them") {
    for (const std::size_t count : {0, 1, 7, 15, 16, 17, 31, 100, 2048}) {
        const std::vector<float> a = random_floats(count, 10);
        const std::vector<float> b = random_floats(count, 11);
        double exact = 0;
        double size = 0;
        for (std::size_t i = 0; i < count; i++) {
            const double product = static_cast<double>(a[i]) * static_cast<double>(b[i]);
            exact += product;
            size += std::fabs(product);
        }
        for (const auto& kernels : tested_kernels()) {
            const float found = kernels.dot(a.data(), b.data(), static_cast<std::int64_t>(count));
            if (!(std::fabs(static_cast<double>(found) - exact) <= 1e-6 * size)) {
                fail(__FILE__, __LINE__, std::string(kernels.name) + ": " + show(found) + " instead of " + show(exact) + " of " + std::to_string(count));
            }
        }
    }
}

TEST_CASE("gated linear units are those of double precision, also where exponentials leave the range of floats") {
    std::vector<float> gates = random_floats(1000, 8, 4.0f);
    for (const float gate : {0.0f, -0.0f, 87.5f, -87.5f, 89.0f, -89.0f, 1e4f, -1e4f, 1e-30f, -1e-30f}) {
        gates.push_back(gate);
    }
    const std::vector<float> ups = random_floats(gates.size(), 9);
    for (const auto& kernels : tested_kernels()) {
        const auto check = [&](const Glu& glu, auto unit) {
            std::vector<float> found(gates.size());
            kernels.apply_glu(glu, gates.data(), ups.data(), found.data(), static_cast<std::int64_t>(gates.size()));
            for (std::size_t i = 0; i < gates.size(); i++) {
                const double exact = unit(static_cast<double>(gates[i]), static_cast<double>(ups[i]));
                if (!(std::fabs(static_cast<double>(found[i]) - exact) <= 2e-5 * std::fabs(exact) + 1e-30)) {
                    fail(__FILE__, __LINE__, std::string(kernels.name) + ": gate " + show(gates[i]) + ", " + show(found[i]) + " instead of " + show(exact));
                }
            }
        };
        const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
        check({Glu::Kind::swiglu}, [&](double g, double u) { return g * sigmoid(g) * u; });
        check({Glu::Kind::reglu}, [&](double g, double u) { return std::max(g, 0.0) * u; });
        check({Glu::Kind::geglu_quick}, [&](double g, double u) { return g * sigmoid(1.702 * g) * u; });
        check({Glu::Kind::geglu}, [&](double g, double u) { return g * sigmoid(2 * std::sqrt(2 / std::acos(-1.0)) * g * (1 + 0.044715 * g * g)) * u; });
        check({Glu::Kind::swiglu_oai, 1.702f, 7.0f}, [&](double g, double u) {
            const double limited = std::min(g, 7.0);
            return limited * sigmoid(static_cast<double>(1.702f) * limited) * (std::clamp(u, -7.0, 7.0) + 1);
        });
    }
}
