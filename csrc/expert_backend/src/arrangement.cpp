#include "arrangement.h"

#include <cstring>

#include "format.h"

namespace llama_moe::experts {
namespace {

// Of Q5_0 and Q5_1: bit i of the word is the high bit of weight i of the block. Step s of the lower half needs bits 4s to 4s+3, that of the
// upper half those 16 further on, one in each byte of a lane: bit 2s of byte b for the lower half, bit 2s+1 for the upper one.
std::uint32_t spread_bits(std::uint32_t bits) {
    std::uint32_t spread = 0;
    for (unsigned step = 0; step < 4; step++) {
        for (unsigned half = 0; half < 2; half++) {
            const std::uint32_t four = (bits >> (16 * half + 4 * step)) & 15;
            spread |= ((four * 0x00204081u) & 0x01010101u) << (2 * step + half);  // copies 7 bits apart put bit b into byte b
        }
    }
    return spread;
}

std::uint32_t gather_bits(std::uint32_t spread) {
    std::uint32_t bits = 0;
    for (unsigned step = 0; step < 4; step++) {
        for (unsigned half = 0; half < 2; half++) {
            const std::uint32_t four = ((spread >> (2 * step + half)) & 0x01010101u) * 0x01020408u >> 24;  // the same the other way round
            bits |= four << (16 * half + 4 * step);
        }
    }
    return bits;
}

template <std::uint32_t (*Reorder)(std::uint32_t)>
void reorder_high_bits(std::uint8_t* block) {
    std::uint8_t* words = block + 256;
    for (std::size_t row = 0; row < kGroupRows; row++) {
        std::uint32_t word;
        std::memcpy(&word, words + 4 * row, 4);
        word = Reorder(word);
        std::memcpy(words + 4 * row, &word, 4);
    }
}

// A super-block's weights, one to a byte: of each span, step and sub those of 16 rows, four columns of each.
constexpr int kVector = 64;
using Vector = std::uint8_t[kVector];

// Applies `work` to each byte of a vector; where they are and go is for `work` to say. Compilers make vectors of the loop.
template <class Work>
inline void for_bytes(Work work) {
    for (int i = 0; i < kVector; i++) {
        work(i);
    }
}

inline std::uint8_t byte(int bits) {
    return static_cast<std::uint8_t>(bits);
}

// Q6_K, spans of 4 subs with 4 steps. ggml: nibbles of the first and the second sub, those of the third and fourth above them, and the two
// high bits of all four; here of each step x, y and z, with the first three in their low bits and the fourth in their high ones.
void arrange_q6_k(std::uint8_t* block) {
    constexpr int kSteps = 4;
    std::uint8_t from[3 * kSteps][kVector];
    for (std::uint8_t* span = block + 288; span < block + 288 + 4 * sizeof from; span += sizeof from) {
        std::memcpy(from, span, sizeof from);
        for (int step = 0; step < kSteps; step++) {
            const Vector &first = from[step], &second = from[kSteps + step], &high = from[2 * kSteps + step];
            std::uint8_t* x = span + 3 * kVector * step;
            for_bytes([&](int i) {
                const int fourth = second[i] >> 4 | high[i] >> 6 << 4;
                x[i] = byte((first[i] & 15) | (high[i] & 3) << 4 | (fourth & 3) << 6);
                x[kVector + i] = byte((second[i] & 15) | (high[i] >> 2 & 3) << 4 | (fourth >> 2 & 3) << 6);
                x[2 * kVector + i] = byte(first[i] >> 4 | (high[i] >> 4 & 3) << 4 | fourth >> 4 << 6);
            });
        }
    }
}

void restore_q6_k(std::uint8_t* block) {
    constexpr int kSteps = 4;
    std::uint8_t from[kSteps][3][kVector];
    for (std::uint8_t* span = block + 288; span < block + 288 + 4 * sizeof from; span += sizeof from) {
        std::memcpy(from, span, sizeof from);
        for (int step = 0; step < kSteps; step++) {
            const Vector &x = from[step][0], &y = from[step][1], &z = from[step][2];
            std::uint8_t* first = span + kVector * step;
            for_bytes([&](int i) {
                const int fourth = x[i] >> 6 | y[i] >> 6 << 2 | z[i] >> 6 << 4;
                first[i] = byte((x[i] & 15) | (z[i] & 15) << 4);
                first[kSteps * kVector + i] = byte((y[i] & 15) | (fourth & 15) << 4);
                first[2 * kSteps * kVector + i] = byte((x[i] >> 4 & 3) | (y[i] >> 4 & 3) << 2 | (z[i] >> 4 & 3) << 4 | fourth >> 4 << 6);
            });
        }
    }
}

// Q3_K, spans of 4 subs with 4 steps. ggml: the high bits of all spans, then of each span and step two low bits of each sub; here of each two
// steps a and b x, y and z: a's first, second and fourth in x, b's in y, and in z the third ones and the high bits of the fourth.
constexpr int kHighOfQ3K = 224, kLowOfQ3K = 736, kSizeOfQ3K = 1760;

void arrange_q3_k(std::uint8_t* block) {
    std::uint8_t from[kSizeOfQ3K];
    std::memcpy(from, block, sizeof from);
    std::uint8_t* x = block + kHighOfQ3K;
    for (int span = 0; span < 4; span++) {
        for (int pair = 0; pair < 2; pair++, x += 3 * kVector) {
            const std::uint8_t* low = from + kLowOfQ3K + kVector * (4 * span + 2 * pair);
            const std::uint8_t* high = from + kHighOfQ3K + kVector * (4 * (span % 2) + 2 * pair);
            for_bytes([&](int i) {
                const auto weight = [&](int step, int sub) {
                    const int at = kVector * step + i;
                    return (low[at] >> (2 * sub) & 3) | (high[at] >> (span / 2 * 4 + sub) & 1) << 2;
                };
                x[i] = byte(weight(0, 0) | weight(0, 1) << 3 | (weight(0, 3) & 3) << 6);
                x[kVector + i] = byte(weight(1, 0) | weight(1, 1) << 3 | (weight(1, 3) & 3) << 6);
                x[2 * kVector + i] = byte(weight(0, 2) | weight(1, 2) << 3 | weight(0, 3) >> 2 << 6 | weight(1, 3) >> 2 << 7);
            });
        }
    }
}

void restore_q3_k(std::uint8_t* block) {
    std::uint8_t from[kSizeOfQ3K];
    std::memcpy(from, block, sizeof from);
    std::memset(block + kHighOfQ3K, 0, kSizeOfQ3K - kHighOfQ3K);
    const std::uint8_t* x = from + kHighOfQ3K;
    for (int span = 0; span < 4; span++) {
        for (int pair = 0; pair < 2; pair++, x += 3 * kVector) {
            std::uint8_t* low = block + kLowOfQ3K + kVector * (4 * span + 2 * pair);
            std::uint8_t* high = block + kHighOfQ3K + kVector * (4 * (span % 2) + 2 * pair);
            for_bytes([&](int i) {
                const int z = x[2 * kVector + i];
                for (int step = 0; step < 2; step++) {
                    const int own = x[kVector * step + i];
                    const int third = z >> (3 * step) & 7;
                    const int at = kVector * step + i;
                    low[at] = byte((own & 3) | (own >> 3 & 3) << 2 | (third & 3) << 4 | own >> 6 << 6);
                    high[at] |= byte(((own >> 2 & 1) | (own >> 5 & 1) << 1 | third >> 2 << 2 | (z >> (6 + step) & 1) << 3) << (span / 2 * 4));
                }
            });
        }
    }
}

// Q5_K, spans of 2 subs with 8 steps. ggml: the high bits of all spans, then of each span and step the low four of both subs; here of each four
// steps five vectors with a weight in their low bits (both subs of steps 0 and 1, the first of step 2) and the three others in the high ones.
constexpr int kHighOfQ5K = 256, kLowOfQ5K = 768, kSizeOfQ5K = 2816;

void arrange_q5_k(std::uint8_t* block) {
    std::uint8_t from[kSizeOfQ5K];
    std::memcpy(from, block, sizeof from);
    std::uint8_t* to = block + kHighOfQ5K;
    for (int span = 0; span < 4; span++) {
        for (int half = 0; half < 2; half++, to += 5 * kVector) {
            const std::uint8_t* low = from + kLowOfQ5K + kVector * (8 * span + 4 * half);
            const std::uint8_t* high = from + kHighOfQ5K + kVector * 4 * half;
            for_bytes([&](int i) {
                const auto weight = [&](int step, int sub) {
                    const int at = kVector * step + i;
                    return (low[at] >> (4 * sub) & 15) | (high[at] >> (2 * span + sub) & 1) << 4;
                };
                const int a = weight(2, 1), b = weight(3, 0), c = weight(3, 1);
                to[i] = byte(weight(0, 0) | (a & 7) << 5);
                to[kVector + i] = byte(weight(0, 1) | a >> 3 << 5 | (b & 1) << 7);
                to[2 * kVector + i] = byte(weight(1, 0) | (b >> 1 & 7) << 5);
                to[3 * kVector + i] = byte(weight(1, 1) | b >> 4 << 5 | (c & 3) << 6);
                to[4 * kVector + i] = byte(weight(2, 0) | c >> 2 << 5);
            });
        }
    }
}

void restore_q5_k(std::uint8_t* block) {
    std::uint8_t from[kSizeOfQ5K];
    std::memcpy(from, block, sizeof from);
    std::memset(block + kHighOfQ5K, 0, kSizeOfQ5K - kHighOfQ5K);
    const std::uint8_t* x = from + kHighOfQ5K;
    for (int span = 0; span < 4; span++) {
        for (int half = 0; half < 2; half++, x += 5 * kVector) {
            std::uint8_t* low = block + kLowOfQ5K + kVector * (8 * span + 4 * half);
            std::uint8_t* high = block + kHighOfQ5K + kVector * 4 * half;
            for_bytes([&](int i) {
                const auto five = [&](int vector) { return x[kVector * vector + i] & 31; };
                const auto rest = [&](int vector) { return x[kVector * vector + i] >> 5; };
                const int weights[4][2] = {{five(0), five(1)},
                                           {five(2), five(3)},
                                           {five(4), rest(0) | (rest(1) & 3) << 3},
                                           {rest(1) >> 2 | rest(2) << 1 | (rest(3) & 1) << 4, rest(3) >> 1 | rest(4) << 2}};
                for (int step = 0; step < 4; step++) {
                    const int at = kVector * step + i;
                    low[at] = byte((weights[step][0] & 15) | (weights[step][1] & 15) << 4);
                    high[at] |= byte((weights[step][0] >> 4 | weights[step][1] >> 4 << 1) << (2 * span));
                }
            });
        }
    }
}

}  // namespace

const Arrangement arrangement_of_q5 = {reorder_high_bits<spread_bits>, reorder_high_bits<gather_bits>};
const Arrangement arrangement_of_q3_k = {arrange_q3_k, restore_q3_k};
const Arrangement arrangement_of_q5_k = {arrange_q5_k, restore_q5_k};
const Arrangement arrangement_of_q6_k = {arrange_q6_k, restore_q6_k};

}  // namespace llama_moe::experts
