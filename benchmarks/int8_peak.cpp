// How many 8-bit multiplications and additions the machine's vector units do per second: what prompts are measured against.
//
//     int8-peak THREADS
//
// Each thread repeats the machine's best instructions for a dot product of 8-bit numbers on registers, without memory: VNNI where
// there is VNNI, the dot product of Arm, and on AVX2 the three instructions that stand for it. A multiplication and an addition are two
// operations. It is compiled for the machine it runs on (-march=native), as the peers are.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

// Enough sums that none waits for its own last addition.
constexpr int sums = 12;
constexpr int rounds = 1 << 16;

#if defined(__AVX512VNNI__)
constexpr const char * instruction = "AVX-512 VNNI";
using Sum = __m512i;
constexpr int products = 64;
Sum zero() { return _mm512_setzero_si512(); }
Sum start(int seed) { return _mm512_set1_epi8(static_cast<char>(seed)); }
Sum add_products(Sum sum, Sum a, Sum b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
constexpr const char * instruction = "AVX-VNNI";
using Sum = __m256i;
constexpr int products = 32;
Sum zero() { return _mm256_setzero_si256(); }
Sum start(int seed) { return _mm256_set1_epi8(static_cast<char>(seed)); }
Sum add_products(Sum sum, Sum a, Sum b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX2__)
constexpr const char * instruction = "AVX2 vpmaddubsw, vpmaddwd, vpaddd";
using Sum = __m256i;
constexpr int products = 32;
Sum zero() { return _mm256_setzero_si256(); }
Sum start(int seed) { return _mm256_set1_epi8(static_cast<char>(seed)); }
Sum add_products(Sum sum, Sum a, Sum b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr const char * instruction = "NEON sdot";
using Sum = int32x4_t;
constexpr int products = 16;
Sum zero() { return vdupq_n_s32(0); }
Sum start(int seed) { return vreinterpretq_s32_s8(vdupq_n_s8(static_cast<signed char>(seed))); }
Sum add_products(Sum sum, Sum a, Sum b) { return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
#else
constexpr const char * instruction = "none";
using Sum = int;
constexpr int products = 1;
Sum zero() { return 0; }
Sum start(int seed) { return seed; }
Sum add_products(Sum sum, Sum a, Sum b) { return sum + a * b; }
#endif

// Makes the compiler take a value as unknown, so that it neither removes nor moves what is computed from it.
void forget(Sum & value) {
#if defined(__x86_64__)
    __asm__ volatile("" : "+x"(value));
#elif defined(__ARM_NEON)
    __asm__ volatile("" : "+w"(value));
#else
    __asm__ volatile("" : "+r"(value));
#endif
}

void compute() {
    Sum sum[sums];
    for (auto & each : sum) {
        each = zero();
    }
    Sum a = start(3);
    Sum b = start(5);
    for (int round = 0; round < rounds; ++round) {
        forget(a);
        forget(b);
#pragma GCC unroll 12
        for (int i = 0; i < sums; ++i) {
            // What another sum added is no reason to do less: each product is computed anew.
            Sum factor = a;
            forget(factor);
            sum[i] = add_products(sum[i], factor, b);
        }
    }
    for (auto & each : sum) {
        forget(each);
    }
}

} // namespace

int main(int argc, char ** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    if (threads < 1) {
        std::fprintf(stderr, "usage: int8-peak THREADS\n");
        return 1;
    }
    using Clock = std::chrono::steady_clock;
    double best = 0;
    for (int attempt = 0; attempt < 5; ++attempt) { // the first ones wake the cores up
        std::atomic<long> calls{0};
        std::atomic<bool> over{false};
        std::vector<std::thread> pool;
        const auto begin = Clock::now();
        for (int i = 0; i < threads; ++i) {
            pool.emplace_back([&] {
                while (!over) {
                    compute();
                    ++calls;
                }
            });
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        over = true;
        for (auto & thread : pool) {
            thread.join();
        }
        const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
        const double rate = 2.0 * products * sums * rounds * static_cast<double>(calls.load()) / seconds;
        best = rate > best ? rate : best;
    }
    std::printf("{\"operations_per_second\": %.6g, \"instruction\": \"%s\"}\n", best, instruction);
    return 0;
}
