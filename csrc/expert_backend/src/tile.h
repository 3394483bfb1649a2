#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "format.h"

// How the kernels read each format: groups of 16 packed rows become vectors of 64 bytes, of four weights of each row (`Bytes` of an `Arch`),
// with a scale for each row. Written in terms of an Arch (multiply.h), so that it is the same for all processors.
namespace llama_moe::experts {
namespace {  // each processor's kernels have a copy of their own, compiled for it, which must not be taken for another's

constexpr int kTileColumns = 256;

// A number that a function can take apart at compile time.
template <int Number>
constexpr std::integral_constant<int, Number> kAt{};

// Calls work(kAt<0>), work(kAt<1>) and so on, `Count` times.
template <class Work, int... Numbers>
[[gnu::always_inline]] inline void for_constants(std::integer_sequence<int, Numbers...>, [[maybe_unused]] Work work) {
    (work(kAt<Numbers>), ...);
}
template <int Count, class Work>
[[gnu::always_inline]] inline void for_constants(Work work) {
    for_constants(std::make_integer_sequence<int, Count>(), work);
}

// The integer scales and minimums of a super-block, for each of its 16 or 8 parts ("subs") and each row.
struct alignas(64) SubScales {
    std::int8_t scales[16 * kGroupRows];
    std::int8_t minimums[16 * kGroupRows];
};

// Eight bytes at once: scales are packed as those of 16 rows next to each other.
using Word = std::uint64_t;
constexpr Word each(unsigned byte) {
    return 0x0101010101010101u * byte;
}
inline Word word(const std::uint8_t* bytes, int i) {
    Word result;
    std::memcpy(&result, bytes + 8 * i, 8);
    return result;
}
inline void set_word(std::int8_t* bytes, int i, Word word) {
    std::memcpy(bytes + 8 * i, &word, 8);
}
// Of numbers of 6 bits: those less 32.
inline Word less_32(Word numbers) {
    const Word raised = numbers ^ each(32);
    return raised | (raised & each(32)) * 6;
}

// The values of IQ4_NL and IQ4_XS (kvalues_iq4nl) raised by `Offset`, as bytes.
template <int Offset>
struct Iq4Values {
    std::int8_t at[16] = {};
    constexpr Iq4Values() {
        constexpr int kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
        for (int i = 0; i < 16; i++) {
            at[i] = static_cast<std::int8_t>(kValues[i] + Offset);
        }
    }
};
template <int Offset>
constexpr Iq4Values<Offset> kIq4Values{};

// Those of MXFP4 (kvalues_mxfp4) raised by 12 so that none is negative.
constexpr std::int8_t kMxfp4Values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Of every format:
//   kType; kBytes, of a row's block; kSub, the columns of a scale, 0 for floats; kSuperBlock;
//   kLargest, the largest unpacked weight, which says how many products fit into 16 bits;
//   kRaised, how much larger unpacked weights are than what they stand for; kSigned, whether they have a sign (then Arch::kOffset is added);
//   kMinimums, whether a row has minimums or offsets too;
//   kSpans and kSpanSubs: a block is read in `kSpans` parts, each with weights of `kSpanSubs` subs, which sub() says;
//   span(), which calls take(which sub of the span, step of the sub, bytes), each sub's steps in order;
//   of super-blocks kFactors, where those of the scales are, followed by those of minimums, and sub_scales();
//   of blocks scales() and, if there are some, minimums().

// Nibbles of a block of 32: low ones are the first half of the columns, high ones the second.
template <class Arch, class Take>
inline void take_nibbles(const std::uint8_t* quants, Take take) {
    for_constants<4>([&](auto step) {
        const auto both = Arch::load(quants + 64 * step);
        take(step, Arch::low_nibbles(both));
        take(kAt<step + 4>, Arch::high_nibbles(both));
    });
}

// What blocks of 32 columns share, of which `Scale` is where the scales are.
template <int Scale>
struct Block {
    static constexpr int kSub = 32, kSpans = 1, kSpanSubs = 1, kRaised = 0;
    static constexpr bool kSuperBlock = false, kSigned = false, kMinimums = false;
    static constexpr int sub(int, int) { return 0; }
    template <class Arch>
    static auto scales(const std::uint8_t* group) {
        return Arch::from_halves(group + Scale);
    }
    template <class Arch>
    static auto minimums(const std::uint8_t* group) {
        return Arch::from_halves(group + Scale + 32);
    }
};

struct Q4_1 : Block<256> {
    static constexpr ggml_type kType = GGML_TYPE_Q4_1;
    static constexpr int kBytes = 20, kLargest = 15;
    static constexpr bool kMinimums = true;

    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span, Take take) {
        take_nibbles<Arch>(group, [&](auto step, auto nibbles) { take(kAt<0>, step, nibbles); });
    }
};

struct Q4_0 : Q4_1 {
    static constexpr ggml_type kType = GGML_TYPE_Q4_0;
    static constexpr int kBytes = 18, kRaised = 8;
    static constexpr bool kMinimums = false;
};

// Fifth bits: bit 2 x step, and the next for the upper half, of each byte.
struct Q5_1 : Block<320> {
    static constexpr ggml_type kType = GGML_TYPE_Q5_1;
    static constexpr int kBytes = 24, kLargest = 31;
    static constexpr bool kMinimums = true;

    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span, Take take) {
        const auto high = Arch::load(group + 256);
        take_nibbles<Arch>(group, [&](auto step, auto nibbles) {
            take(kAt<0>, step, Arch::bit_or(nibbles, Arch::template bits<2 * (step % 4) + step / 4, 1, 4>(high)));
        });
    }
};

struct Q5_0 : Q5_1 {
    static constexpr ggml_type kType = GGML_TYPE_Q5_0;
    static constexpr int kBytes = 22, kRaised = 16;
    static constexpr bool kMinimums = false;
};

struct Q8_0 : Block<512> {
    static constexpr ggml_type kType = GGML_TYPE_Q8_0;
    static constexpr int kBytes = 34, kLargest = 128;
    static constexpr bool kSigned = true;

    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span, Take take) {
        for_constants<8>([&](auto step) { take(kAt<0>, step, Arch::raise(Arch::load(group + 64 * step))); });
    }
};

struct Iq4Nl : Block<256> {
    static constexpr ggml_type kType = GGML_TYPE_IQ4_NL;
    static constexpr int kBytes = 18, kLargest = 127;
    static constexpr bool kSigned = true;

    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span, Take take) {
        const auto values = Arch::table(kIq4Values<Arch::kOffset>.at);
        take_nibbles<Arch>(group, [&](auto step, auto nibbles) { take(kAt<0>, step, Arch::look_up(values, nibbles)); });
    }
};

struct Mxfp4 : Block<256> {
    static constexpr ggml_type kType = GGML_TYPE_MXFP4;
    static constexpr int kBytes = 17, kLargest = 24, kRaised = 12;

    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span, Take take) {
        const auto values = Arch::table(kMxfp4Values);
        take_nibbles<Arch>(group, [&](auto step, auto nibbles) { take(kAt<0>, step, Arch::look_up(values, nibbles)); });
    }

    // 2^(exponent - 128): the values are twice those of E2M1.
    template <class Arch>
    static auto scales(const std::uint8_t* group) {
        alignas(64) std::uint32_t bits[kGroupRows];
        for (int row = 0; row < kGroupRows; row++) {
            const std::uint32_t exponent = group[256 + row];
            bits[row] = exponent < 2 ? 0x00200000u * (exponent + 1) : (exponent - 1) << 23;
        }
        float powers[kGroupRows];
        static_assert(sizeof powers == sizeof bits);
        std::memcpy(powers, bits, sizeof powers);
        return Arch::load_floats(powers);
    }
};

struct Q2_K {
    static constexpr ggml_type kType = GGML_TYPE_Q2_K;
    static constexpr int kBytes = 84, kSub = 16, kLargest = 3, kRaised = 0, kSpans = 4, kSpanSubs = 4, kFactors = 256, kQuants = 320;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    // Two spans have the first half of the columns.
    static constexpr int sub(int span, int i) { return 8 * (span / 2) + 2 * i + span % 2; }
    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span span, Take take) {
        for_constants<4>([&](auto step) {
            const auto quants = Arch::load(group + kQuants + 64 * (4 * span + step));
            for_constants<4>([&](auto i) { take(i, step, Arch::template bits<2 * i, 2, 0>(quants)); });
        });
    }
    static void sub_scales(const std::uint8_t* group, SubScales& to) {
        for (int i = 0; i < 32; i++) {
            set_word(to.scales, i, word(group, i) & each(15));
            set_word(to.minimums, i, word(group, i) >> 4 & each(15));
        }
    }
};

struct Q3_K {
    static constexpr ggml_type kType = GGML_TYPE_Q3_K;
    static constexpr int kBytes = 110, kSub = 16, kLargest = 7, kRaised = 4, kSpans = 4, kSpanSubs = 4, kFactors = 192, kQuants = 224;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = false;

    static constexpr int sub(int span, int i) { return Q2_K::sub(span, i); }
    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span span, Take take) {
        for_constants<2>([&](auto pair) {
            const std::uint8_t* quants = group + kQuants + 64 * (6 * span + 3 * pair);
            const auto x = Arch::load(quants);
            const auto y = Arch::load(quants + 64);
            const auto z = Arch::load(quants + 128);
            const auto take_step = [&](auto step, const auto& own, auto of_step) {
                take(kAt<0>, step, Arch::template bits<0, 3, 0>(own));
                take(kAt<1>, step, Arch::template bits<3, 3, 0>(own));
                take(kAt<2>, step, Arch::template bits<3 * of_step, 3, 0>(z));
                take(kAt<3>, step, Arch::bit_or(Arch::template bits<6, 2, 0>(own), Arch::template bits<6 + of_step, 1, 2>(z)));
            };
            take_step(kAt<2 * pair>, x, kAt<0>);
            take_step(kAt<2 * pair + 1>, y, kAt<1>);
        });
    }
    // 6 bits each: four in the first eight bytes, as nibbles, two in the last four.
    static void sub_scales(const std::uint8_t* group, SubScales& to) {
        for (int i = 0; i < 8; i++) {
            const Word high = word(group + 128, i);
            set_word(to.scales, i, less_32((word(group, i) & each(15)) | (high << 4 & each(48))));
            set_word(to.scales + 4 * kGroupRows, i, less_32((word(group + 64, i) & each(15)) | (high << 2 & each(48))));
            set_word(to.scales + 8 * kGroupRows, i, less_32((word(group, i) >> 4 & each(15)) | (high & each(48))));
            set_word(to.scales + 12 * kGroupRows, i, less_32((word(group + 64, i) >> 4 & each(15)) | (high >> 2 & each(48))));
        }
    }
};

// Scales and minimums of Q4_K and Q5_K: 6 bits each in 12 bytes.
inline void six_bits(const std::uint8_t* bytes, SubScales& to) {
    for (int i = 0; i < 8; i++) {
        const Word scales = word(bytes, i);
        const Word minimums = word(bytes + 64, i);
        const Word rest = word(bytes + 128, i);
        set_word(to.scales, i, scales & each(63));
        set_word(to.minimums, i, minimums & each(63));
        set_word(to.scales + 4 * kGroupRows, i, (rest & each(15)) | (scales >> 2 & each(48)));
        set_word(to.minimums + 4 * kGroupRows, i, (rest >> 4 & each(15)) | (minimums >> 2 & each(48)));
    }
}

struct Q4_K {
    static constexpr ggml_type kType = GGML_TYPE_Q4_K;
    static constexpr int kBytes = 144, kSub = 32, kLargest = 15, kRaised = 0, kSpans = 4, kSpanSubs = 2, kFactors = 192, kQuants = 256;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    static constexpr int sub(int span, int i) { return 2 * span + i; }
    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span span, Take take) {
        for_constants<8>([&](auto step) {
            const auto both = Arch::load(group + kQuants + 64 * (8 * span + step));
            take(kAt<0>, step, Arch::low_nibbles(both));
            take(kAt<1>, step, Arch::high_nibbles(both));
        });
    }
    static void sub_scales(const std::uint8_t* group, SubScales& to) { six_bits(group, to); }
};

struct Q5_K {
    static constexpr ggml_type kType = GGML_TYPE_Q5_K;
    static constexpr int kBytes = 176, kSub = 32, kLargest = 31, kRaised = 0, kSpans = 4, kSpanSubs = 2, kFactors = 192, kQuants = 256;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = true;

    static constexpr int sub(int span, int i) { return 2 * span + i; }
    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span span, Take take) {
        for_constants<2>([&](auto half) {
            const std::uint8_t* quants = group + kQuants + 64 * (10 * span + 5 * half);
            const auto low = [](const auto& bytes) { return Arch::template bits<0, 5, 0>(bytes); };
            const auto v0 = Arch::load(quants);
            take(kAt<0>, kAt<4 * half>, low(v0));
            const auto v1 = Arch::load(quants + 64);
            take(kAt<1>, kAt<4 * half>, low(v1));
            const auto v2 = Arch::load(quants + 128);
            take(kAt<0>, kAt<4 * half + 1>, low(v2));
            const auto v3 = Arch::load(quants + 192);
            take(kAt<1>, kAt<4 * half + 1>, low(v3));
            const auto v4 = Arch::load(quants + 256);
            take(kAt<0>, kAt<4 * half + 2>, low(v4));
            take(kAt<1>, kAt<4 * half + 2>, Arch::bit_or(Arch::template bits<5, 3, 0>(v0), Arch::template bits<5, 2, 3>(v1)));
            take(kAt<0>, kAt<4 * half + 3>,
                 Arch::bit_or(Arch::bit_or(Arch::template bits<7, 1, 0>(v1), Arch::template bits<5, 3, 1>(v2)), Arch::template bits<5, 1, 4>(v3)));
            take(kAt<1>, kAt<4 * half + 3>, Arch::bit_or(Arch::template bits<6, 2, 0>(v3), Arch::template bits<5, 3, 2>(v4)));
        });
    }
    static void sub_scales(const std::uint8_t* group, SubScales& to) { six_bits(group, to); }
};

struct Q6_K {
    static constexpr ggml_type kType = GGML_TYPE_Q6_K;
    static constexpr int kBytes = 210, kSub = 16, kLargest = 63, kRaised = 32, kSpans = 4, kSpanSubs = 4, kFactors = 256, kQuants = 288;
    static constexpr bool kSuperBlock = true, kSigned = false, kMinimums = false;

    static constexpr int sub(int span, int i) { return Q2_K::sub(span, i); }
    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span span, Take take) {
        for_constants<4>([&](auto step) {
            const std::uint8_t* quants = group + kQuants + 64 * (12 * span + 3 * step);
            const auto x = Arch::load(quants);
            const auto y = Arch::load(quants + 64);
            const auto z = Arch::load(quants + 128);
            take(kAt<0>, step, Arch::template bits<0, 6, 0>(x));
            take(kAt<1>, step, Arch::template bits<0, 6, 0>(y));
            take(kAt<2>, step, Arch::template bits<0, 6, 0>(z));
            take(kAt<3>, step,
                 Arch::bit_or(Arch::bit_or(Arch::template bits<6, 2, 0>(x), Arch::template bits<6, 2, 2>(y)), Arch::template bits<6, 2, 4>(z)));
        });
    }
    static void sub_scales(const std::uint8_t* group, SubScales& to) { std::memcpy(to.scales, group, sizeof to.scales); }
};

struct Iq4Xs {
    static constexpr ggml_type kType = GGML_TYPE_IQ4_XS;
    static constexpr int kBytes = 136, kSub = 32, kLargest = 127, kRaised = 0, kSpans = 8, kSpanSubs = 1, kFactors = 96, kQuants = 128;
    static constexpr bool kSuperBlock = true, kSigned = true, kMinimums = false;

    static constexpr int sub(int span, int) { return span; }
    template <class Arch, class Span, class Take>
    static void span(const std::uint8_t* group, Span span, Take take) {
        const auto values = Arch::table(kIq4Values<Arch::kOffset>.at);
        take_nibbles<Arch>(group + kQuants + 256 * span, [&](auto step, auto nibbles) { take(kAt<0>, step, Arch::look_up(values, nibbles)); });
    }
    // 6 bits each: two in the first two bytes, four in the others, as nibbles.
    static void sub_scales(const std::uint8_t* group, SubScales& to) {
        for (int sub = 0; sub < 8; sub++) {
            for (int i = 0; i < 2; i++) {
                const Word high = word(group + 16 * (sub / 4), i) >> (2 * (sub % 4)) & each(3);
                const Word low = word(group + 32 + 16 * (sub / 2), i) >> (4 * (sub % 2)) & each(15);
                set_word(to.scales + sub * kGroupRows, i, less_32(low | high << 4));
            }
        }
    }
};

struct F16 {
    static constexpr ggml_type kType = GGML_TYPE_F16;
    static constexpr int kSub = 0;

    template <class Arch>
    static auto weights(const std::uint8_t* group) {
        return Arch::from_halves(group);
    }
};

struct Bf16 {
    static constexpr ggml_type kType = GGML_TYPE_BF16;
    static constexpr int kSub = 0;

    template <class Arch>
    static auto weights(const std::uint8_t* group) {
        return Arch::from_bf16(group);
    }
};

}  // namespace
}  // namespace llama_moe::experts
