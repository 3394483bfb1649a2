#include "activations.h"

#include <cstring>

namespace llama_moe::experts {
namespace {

template <class Vector>
void grow(Vector& vector, std::int64_t size) {
    if (vector.size() < static_cast<std::size_t>(size)) {
        vector.resize(static_cast<std::size_t>(size));
    }
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
    sums_of_block_ = kind == ActivationKind::super_blocks ? kSumsOfSuperBlock : 1;
    grow(values_, rows * k);
    grow(scales_, rows * blocks_);
    grow(sums_, rows * blocks_ * sums_of_block_);
}

void Activations::set_row(std::int64_t row, const float* values) {
    if (kind_ == ActivationKind::floats) {
        std::memcpy(floats_.data() + row * k_, values, static_cast<std::size_t>(k_) * sizeof(float));
        return;
    }
    round_row_(kind_, k_, values, values_.data() + row * k_, scales_.data() + row * blocks_, sums_.data() + row * blocks_ * sums_of_block_);
}

}  // namespace llama_moe::experts
