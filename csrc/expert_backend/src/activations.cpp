#include "activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace llama_moe::experts {
namespace {

template <class Vector>
void grow(Vector& vector, std::int64_t size) {
    if (vector.size() < static_cast<std::size_t>(size)) {
        vector.resize(static_cast<std::size_t>(size));
    }
}

// Rounds `count` values to `scale` times -127 to 127; returns the scale. What is not finite makes the scale so too, and with it the product.
float round_block(const float* values, std::int64_t count, std::int8_t* rounded) {
    float largest = 0;
    for (std::int64_t i = 0; i < count; i++) {
        largest = std::max(largest, std::fabs(values[i]));
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (std::int64_t i = 0; i < count; i++) {
        // Adding and subtracting 1.5 * 2^23 rounds to the nearest, ties to even, and is a vector's two instructions.
        constexpr float kRound = 12582912.0f;
        rounded[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(values[i] * inverse + kRound - kRound));
    }
    return largest / 127.0f;
}

template <int Count>
float sum(const std::int8_t* rounded) {
    int sum = 0;
    for (int i = 0; i < Count; i++) {
        sum += rounded[i];
    }
    return static_cast<float>(sum);
}

}  // namespace

void Activations::resize(ActivationKind kind, std::int64_t k, std::int64_t rows) {
    kind_ = kind;
    k_ = k;
    if (kind == ActivationKind::floats) {
        grow(floats_, rows * k);
        return;
    }
    blocks_ = k / (kind == ActivationKind::super_blocks ? 256 : 32);
    grow(values_, rows * k);
    grow(scales_, rows * blocks_);
    grow(sums_, rows * blocks_ * (kind == ActivationKind::super_blocks ? kSumsOfSuperBlock : 1));
}

void Activations::set_row(std::int64_t row, const float* values) {
    if (kind_ == ActivationKind::floats) {
        std::memcpy(floats_.data() + row * k_, values, static_cast<std::size_t>(k_) * sizeof(float));
        return;
    }
    std::int8_t* rounded = values_.data() + row * k_;
    float* scales = scales_.data() + row * blocks_;
    if (kind_ == ActivationKind::super_blocks) {
        float* sums = sums_.data() + row * blocks_ * kSumsOfSuperBlock;
        for (std::int64_t b = 0; b < blocks_; b++, values += 256, rounded += 256, sums += kSumsOfSuperBlock) {
            scales[b] = round_block(values, 256, rounded);
            for (int i = 0; i < 16; i++) {
                sums[i] = sum<16>(rounded + 16 * i);
            }
            for (int i = 0; i < 8; i++) {
                sums[16 + i] = sums[2 * i] + sums[2 * i + 1];
            }
        }
        return;
    }
    float* sums = sums_.data() + row * blocks_;
    for (std::int64_t b = 0; b < blocks_; b++, values += 32, rounded += 32) {
        scales[b] = round_block(values, 32, rounded);
        sums[b] = scales[b] * sum<32>(rounded);
    }
}

}  // namespace llama_moe::experts
