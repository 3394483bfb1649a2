// NEON with dot products: Neoverse N1, Cortex-A76, Apple's M1, and newer. Compiled for those; nothing of it runs elsewhere.
#include "dot_products.h"
#include "intrinsics.h"
#include "multiply.h"

namespace llama_moe::experts {
namespace {

// Vectors of 128 bits, four at a time: rows 0 to 3, 4 to 7, and so on.
struct Neon {
    template <class Vector>
    struct Four {
        Vector at[4];
    };
    using Bytes = Four<uint8x16_t>;
    using Ints = Four<int32x4_t>;
    using Floats = Four<float32x4_t>;
    // Both sides of a dot product have signs. Weights without one are too small to need the eighth bit.
    static constexpr int kOffset = 0;
    static constexpr int kTokensAtOnce = 4;

    // A vector for each i of function(i).
    template <class Function>
    static auto make(Function function) {
        return Four<decltype(function(0))>{{function(0), function(1), function(2), function(3)}};
    }

    static Bytes load(const std::uint8_t* from) {
        return make([&](int i) { return vld1q_u8(from + 16 * i); });
    }
    static void store(std::uint8_t* to, Bytes bytes) {
        for (int i = 0; i < 4; i++) {
            vst1q_u8(to + 16 * i, bytes.at[i]);
        }
    }
    static Bytes bit_or(Bytes a, Bytes b) {
        return make([&](int i) { return vorrq_u8(a.at[i], b.at[i]); });
    }
    static Bytes low_nibbles(Bytes bytes) { return bits<0, 4, 0>(bytes); }
    static Bytes high_nibbles(Bytes bytes) { return bits<4, 4, 0>(bytes); }
    template <int From, int Count, int To>
    static Bytes bits(Bytes bytes) {
        return make([&](int i) {
            uint8x16_t v = bytes.at[i];
            if constexpr (From > To) {
                v = vshrq_n_u8(v, From - To);
            } else if constexpr (From < To) {
                v = vshlq_n_u8(v, To - From);
            }
            return vandq_u8(v, vdupq_n_u8(((1 << Count) - 1) << To));
        });
    }
    static int8x16_t table(const std::int8_t* values) { return vld1q_s8(values); }
    static Bytes look_up(int8x16_t table, Bytes indices) {
        return make([&](int i) { return vqtbl1q_u8(vreinterpretq_u8_s8(table), indices.at[i]); });
    }
    static Bytes raise(Bytes bytes) { return bytes; }

    static Ints zero_ints() {
        return make([](int) { return vdupq_n_s32(0); });
    }
    static Ints dot(Ints ints, Bytes weights, const std::int8_t* values) {
        std::int32_t word;
        std::memcpy(&word, values, 4);
        const int8x16_t words = vreinterpretq_s8_s32(vdupq_n_s32(word));
        return make([&](int i) { return vdotq_s32(ints.at[i], vreinterpretq_s8_u8(weights.at[i]), words); });
    }
    static Ints add(Ints a, Ints b) {
        return make([&](int i) { return vaddq_s32(a.at[i], b.at[i]); });
    }
    static Floats to_floats(Ints ints) {
        return make([&](int i) { return vcvtq_f32_s32(ints.at[i]); });
    }

    static Floats load_floats(const float* from) {
        return make([&](int i) { return vld1q_f32(from + 4 * i); });
    }
    static void store(float* to, Floats floats) {
        for (int i = 0; i < 4; i++) {
            vst1q_f32(to + 4 * i, floats.at[i]);
        }
    }
    static Floats broadcast(float number) {
        return make([&](int) { return vdupq_n_f32(number); });
    }
    static Floats multiply(Floats a, Floats b) {
        return make([&](int i) { return vmulq_f32(a.at[i], b.at[i]); });
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        return make([&](int i) { return vfmaq_f32(c.at[i], a.at[i], b.at[i]); });
    }
    static uint16x4_t load_halves(const std::uint8_t* from) { return vreinterpret_u16_u8(vld1_u8(from)); }
    static Floats from_halves(const std::uint8_t* from) {
        return make([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(from + 8 * i))); });
    }
    static Floats from_bf16(const std::uint8_t* from) {
        return make([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(from + 8 * i), 16)); });
    }
    static Floats from_bytes(const std::int8_t* from) {
        const int8x16_t bytes = vld1q_s8(from);
        const int16x8_t low = vmovl_s8(vget_low_s8(bytes));
        const int16x8_t high = vmovl_s8(vget_high_s8(bytes));
        const auto widen = [](int16x4_t v) { return vcvtq_f32_s32(vmovl_s16(v)); };
        return {{widen(vget_low_s16(low)), widen(vget_high_s16(low)), widen(vget_low_s16(high)), widen(vget_high_s16(high))}};
    }
};

}  // namespace

const KernelSet neon_kernels = {"neon-dotprod", find_multiply<DotProducts<Neon>>, round_row, apply_glu, dot};

}  // namespace llama_moe::experts
