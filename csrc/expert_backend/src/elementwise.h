#pragma once

#include <cmath>
#include <cstring>

#include "activations.h"
#include "glu.h"

// What is done number by number: plain loops, which compilers make vectors of for the processor that a file is compiled for.
namespace llama_moe::experts {
namespace {  // see tile.h

inline std::uint32_t bits_of(float number) {
    std::uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}
inline float from_bits(std::uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// 1.5 x 2^23: added, it rounds to the nearest integer, ties to even, which is then in the lowest bits.
constexpr float kRound = 12582912.0f;

// e to the power of x, to 2e-7 of it; the exponent is kept within what floats have. x = n ln 2 + r with a whole n, and the Taylor series for r.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float rounded = x * 1.44269504f + kRound;
    const float n = rounded - kRound;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, whose first has few digits
    float sum = 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * from_bits((bits_of(rounded) + 127) << 23);
}

inline float sigmoid(float x) {
    return 1.0f / (1.0f + exponential(-x));
}

template <class Unit>
inline void apply(const float* gate, const float* up, float* to, std::int64_t count, Unit unit) {
    for (std::int64_t i = 0; i < count; i++) {
        to[i] = unit(gate[i], up[i]);
    }
}

inline void apply_glu(const Glu& glu, const float* gate, const float* up, float* to, std::int64_t count) {
    switch (glu.kind) {
        case Glu::Kind::swiglu: apply(gate, up, to, count, [](float g, float u) { return g * sigmoid(g) * u; }); break;
        // With tanh: (1 + tanh(y)) / 2 is the sigmoid of 2 y.
        case Glu::Kind::geglu:
            apply(gate, up, to, count, [](float g, float u) { return g * sigmoid(1.59576912f * g * (1.0f + 0.044715f * g * g)) * u; });
            break;
        case Glu::Kind::geglu_quick: apply(gate, up, to, count, [](float g, float u) { return g * sigmoid(1.702f * g) * u; }); break;
        case Glu::Kind::reglu: apply(gate, up, to, count, [](float g, float u) { return (g > 0.0f ? g : 0.0f) * u; }); break;
        case Glu::Kind::swiglu_oai: {
            const float alpha = glu.alpha;
            const float limit = glu.limit;
            apply(gate, up, to, count, [alpha, limit](float g, float u) {
                g = g > limit ? limit : g;
                u = u > limit ? limit : u;
                u = u < -limit ? -limit : u;
                return g * sigmoid(alpha * g) * (u + 1.0f);
            });
            break;
        }
    }
}

// Sixteen sums, which compilers can keep in vectors.
inline float dot(const float* a, const float* b, std::int64_t count) {
    float sums[16] = {};
    std::int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int j = 0; j < 16; j++) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    for (int half = 8; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) {
            sums[j] += sums[j + half];
        }
    }
    for (; i < count; i++) {
        sums[0] += a[i] * b[i];
    }
    return sums[0];
}

// The largest magnitude; not a number if one of them is not. As integers floats have the same order.
inline float largest_of(const float* values, std::int64_t count) {
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < count; i++) {
        const std::uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
        largest = largest < magnitude ? magnitude : largest;
    }
    return from_bits(largest);
}

// Rounds `count` values to `scale` times -127 to 127; returns the scale. What is not finite makes the scale so too, and with it the product.
inline float round_block(const float* values, std::int64_t count, std::int8_t* rounded) {
    const float largest = largest_of(values, count);
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (std::int64_t i = 0; i < count; i++) {
        rounded[i] = static_cast<std::int8_t>(bits_of(values[i] * inverse + kRound));
    }
    return largest / 127.0f;
}

inline void sum_up(const std::int8_t* rounded, SumsOfSuperBlock& sums) {
    for (int i = 0; i < 16; i++, rounded += 16) {
        int halves[2] = {};
        for (int j = 0; j < 16; j++) {
            halves[j % 4 / 2] += rounded[j];
        }
        sums.halves_of_16[i][0] = static_cast<std::int16_t>(halves[0]);
        sums.halves_of_16[i][1] = static_cast<std::int16_t>(halves[1]);
        sums.integers_of_16[i] = static_cast<std::int16_t>(halves[0] + halves[1]);
        sums.of_16[i] = sums.integers_of_16[i];
    }
    for (int i = 0; i < 8; i++) {
        sums.integers_of_32[i] = static_cast<std::int16_t>(sums.integers_of_16[2 * i] + sums.integers_of_16[2 * i + 1]);
        sums.of_32[i] = sums.integers_of_32[i];
    }
}

inline void round_row(ActivationKind kind, std::int64_t k, const float* values, const RoundedRow& to) {
    if (kind == ActivationKind::super_blocks) {
        for (std::int64_t b = 0; b < k / 256; b++) {
            std::int8_t* rounded = to.values + 256 * b;
            to.scales[b] = round_block(values + 256 * b, 256, rounded);
            sum_up(rounded, to.sums_of_super_blocks[b]);
        }
        return;
    }
    for (std::int64_t b = 0; b < k / 32; b++) {
        std::int8_t* rounded = to.values + 32 * b;
        to.scales[b] = round_block(values + 32 * b, 32, rounded);
        int sum = 0;
        for (int i = 0; i < 32; i++) {
            sum += rounded[i];
        }
        to.sums[b] = to.scales[b] * static_cast<float>(sum);
    }
}

}  // namespace
}  // namespace llama_moe::experts
