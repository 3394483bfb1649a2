#pragma once

#include "tile.h"

namespace llama_moe::experts {
namespace {  // see tile.h

// What an Arch needs beyond vectors where the processor has an instruction for the sums of four products of 8-bit numbers: `Vectors` has
// dot(ints, weights, values), which adds them, and zero_ints(). Sums have 32 bits, so any number of steps fits, and integer scales are
// multiplied with their factors beforehand.
template <class Vectors>
struct DotProducts : Vectors {
    using typename Vectors::Bytes;
    using typename Vectors::Floats;
    using typename Vectors::Ints;

    using Sums = Ints;
    template <class F>
    static constexpr int steps_of_sums() {
        return F::kSub / kStep;
    }
    template <class F>
    static Sums first_sums(Bytes weights, const std::int8_t* values) {
        return Vectors::dot(Vectors::zero_ints(), weights, values);
    }
    template <class F>
    static void add_products(Sums& sums, Bytes weights, const std::int8_t* values) {
        sums = Vectors::dot(sums, weights, values);
    }
    static Ints to_ints(Sums sums) { return sums; }
    static constexpr bool kPairs = false;

    using Scale = Floats;
    using Scaled = Floats;
    template <class F>
    static Scale make_scale(const std::int8_t* bytes, Floats factors) {
        return Vectors::multiply(Vectors::from_bytes(bytes), factors);
    }
    static Scaled zero_scaled() { return Vectors::broadcast(0.0f); }
    static void add_scaled(Scaled& products, Sums sums, Scale scale) { products = Vectors::fma(Vectors::to_floats(sums), scale, products); }
    static Floats total(Scaled products, Floats) { return products; }
};

}  // namespace
}  // namespace llama_moe::experts
