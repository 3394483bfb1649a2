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
    const bool super_blocks = kind == ActivationKind::super_blocks;
    blocks_ = k / (super_blocks ? 256 : 32);
    grow(values_, rows * k);
    grow(scales_, rows * blocks_);
    grow(sums_, super_blocks ? 0 : rows * blocks_);
    grow(sums_of_super_blocks_, super_blocks ? rows * blocks_ : 0);
}

void Activations::set_row(std::int64_t row, const float* values) {
    if (kind_ == ActivationKind::floats) {
        std::memcpy(floats_.data() + row * k_, values, static_cast<std::size_t>(k_) * sizeof(float));
        return;
    }
    const std::int64_t block = row * blocks_;
    const bool super_blocks = kind_ == ActivationKind::super_blocks;
    round_row_(kind_, k_, values,
               {values_.data() + row * k_, scales_.data() + block, super_blocks ? nullptr : sums_.data() + block,
                super_blocks ? sums_of_super_blocks_.data() + block : nullptr});
}

}  // namespace llama_moe::experts
