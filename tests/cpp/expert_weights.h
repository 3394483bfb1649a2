// Weights in every type that the expert backend packs, and how exact a product is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "format.h"
#include "ggml.h"

namespace test {

using llama_moe::experts::find_format;

inline std::vector<ggml_type> formats() {
    std::vector<ggml_type> types;
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        if (find_format(static_cast<ggml_type>(type)) != nullptr) {
            types.push_back(static_cast<ggml_type>(type));
        }
    }
    return types;
}

inline std::vector<float> random_floats(std::size_t count, unsigned seed, float size = 1.0f) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal(0.0f, size);
    std::vector<float> floats(count);
    std::generate(floats.begin(), floats.end(), [&] { return normal(engine); });
    return floats;
}

// Rows of weights in one of ggml's types.
inline std::vector<std::uint8_t> quantised(ggml_type type, const std::vector<float>& floats, std::int64_t k) {
    const auto rows = static_cast<std::int64_t>(floats.size()) / k;
    std::vector<std::uint8_t> bytes(ggml_row_size(type, k) * static_cast<std::size_t>(rows));
    if (type == GGML_TYPE_F32) {
        std::memcpy(bytes.data(), floats.data(), bytes.size());
    } else {
        const std::vector<float> importance(static_cast<std::size_t>(k), 1.0f);
        ggml_quantize_chunk(type, floats.data(), bytes.data(), 0, rows, k, importance.data());
    }
    return bytes;
}

inline std::vector<float> dequantised(ggml_type type, const std::vector<std::uint8_t>& bytes, std::size_t count) {
    std::vector<float> floats(count);
    if (type == GGML_TYPE_F32) {
        std::memcpy(floats.data(), bytes.data(), bytes.size());
    } else {
        ggml_get_type_traits(type)->to_float(bytes.data(), floats.data(), static_cast<std::int64_t>(count));
    }
    return floats;
}

inline double normalised_error(const std::vector<float>& found, const std::vector<double>& exact) {
    double error = 0;
    double size = 0;
    for (std::size_t i = 0; i < exact.size(); i++) {
        error += (found[i] - exact[i]) * (found[i] - exact[i]);
        size += exact[i] * exact[i];
    }
    return error / size;
}

}  // namespace test
