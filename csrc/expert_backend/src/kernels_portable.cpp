// Plain C++: what the others are tested against, and what runs where there is no other.
#include <cstring>

#include "multiply.h"

namespace llama_moe::experts {
namespace {

struct Portable {
    template <class Number, int Count>
    struct Vector {
        Number at[Count];
    };
    using Bytes = Vector<std::uint8_t, 64>;
    using Ints = Vector<std::int32_t, kGroupRows>;
    using Floats = Vector<float, kGroupRows>;
    using Table = Vector<std::int8_t, 16>;
    static constexpr int kOffset = 0;
    static constexpr int kTokensAtOnce = 1;

    // Not inlined: compilers would take minutes for what these unroll.
    template <class V, class Function>
    [[gnu::noinline]] static V make(Function function) {
        V result;
        int i = 0;
        for (auto& number : result.at) {
            number = static_cast<std::remove_reference_t<decltype(number)>>(function(i++));
        }
        return result;
    }

    static Bytes load(const std::uint8_t* from) {
        return make<Bytes>([&](int i) { return from[i]; });
    }
    static void store(std::uint8_t* to, const Bytes& bytes) { std::memcpy(to, bytes.at, sizeof bytes.at); }
    static Bytes bit_or(const Bytes& a, const Bytes& b) {
        return make<Bytes>([&](int i) { return a.at[i] | b.at[i]; });
    }
    static Bytes low_nibbles(const Bytes& bytes) { return bits<0, 4, 0>(bytes); }
    static Bytes high_nibbles(const Bytes& bytes) { return bits<4, 4, 0>(bytes); }
    template <int From, int Count, int To>
    static Bytes bits(const Bytes& bytes) {
        return make<Bytes>([&](int i) { return ((bytes.at[i] >> From) & ((1 << Count) - 1)) << To; });
    }
    static Table table(const std::int8_t* values) {
        return make<Table>([&](int i) { return values[i]; });
    }
    static Bytes look_up(const Table& table, const Bytes& indices) {
        return make<Bytes>([&](int i) { return table.at[indices.at[i]]; });
    }
    static Bytes raise(const Bytes& bytes) { return bytes; }

    static Floats load_floats(const float* from) {
        return make<Floats>([&](int i) { return from[i]; });
    }
    static void store(float* to, const Floats& floats) { std::memcpy(to, floats.at, sizeof floats.at); }
    static Floats broadcast(float number) {
        return make<Floats>([&](int) { return number; });
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        return make<Floats>([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return make<Floats>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
    }
    static Floats from_halves(const std::uint8_t* from) {
        return make<Floats>([&](int i) { return ggml_fp16_to_fp32(half(from, i)); });
    }
    static Floats from_bf16(const std::uint8_t* from) {
        return make<Floats>([&](int i) { return ggml_bf16_to_fp32({half(from, i)}); });
    }
    static std::uint16_t half(const std::uint8_t* from, int i) {
        std::uint16_t bits;
        std::memcpy(&bits, from + 2 * i, 2);
        return bits;
    }
    static Floats from_bytes(const std::int8_t* from) {
        return make<Floats>([&](int i) { return from[i]; });
    }

    using Sums = Ints;
    template <class F>
    static constexpr int steps_of_sums() {
        return F::kSub / kStep;
    }
    template <class F>
    static Sums first_sums(const Bytes& weights, const std::int8_t* values) {
        return make<Sums>([&](int row) {
            int sum = 0;
            for (int i = 0; i < kStep; i++) {
                const std::uint8_t weight = weights.at[kStep * row + i];
                sum += (F::kSigned ? static_cast<std::int8_t>(weight) : static_cast<int>(weight)) * values[i];
            }
            return sum;
        });
    }
    template <class F>
    static void add_products(Sums& sums, const Bytes& weights, const std::int8_t* values) {
        sums = add(sums, first_sums<F>(weights, values));
    }
    static Ints to_ints(const Sums& sums) { return sums; }
    static Ints add(const Ints& a, const Ints& b) {
        return make<Ints>([&](int i) { return a.at[i] + b.at[i]; });
    }
    static Floats to_floats(const Ints& ints) {
        return make<Floats>([&](int i) { return ints.at[i]; });
    }

    static constexpr bool kPairs = false;

    using Scale = Ints;
    using Scaled = Ints;
    template <class F>
    static Scale make_scale(const std::int8_t* bytes, const Floats&) {
        return make<Scale>([&](int i) { return bytes[i]; });
    }
    static Scaled zero_scaled() { return {}; }
    static void add_scaled(Scaled& products, const Sums& sums, const Scale& scale) {
        products = make<Scaled>([&](int i) { return products.at[i] + sums.at[i] * scale.at[i]; });
    }
    static Floats total(const Scaled& products, const Floats& factors) { return multiply(to_floats(products), factors); }
};

}  // namespace

const KernelSet portable_kernels = {"portable", find_multiply<Portable>, round_row, apply_glu, dot};

}  // namespace llama_moe::experts
