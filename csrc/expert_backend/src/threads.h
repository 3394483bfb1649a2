#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#else
#include "ggml_threads.h"
#endif

// Threads are those of ggml's CPU backend, with OpenMP or without. They spin for a while when a part of a graph is done; threads of our own
// would compete with those for the processors (6 tokens/s where the same ones do 100), while the same ones just go on.
namespace llama_moe::experts {

inline int all_threads() {
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls work(thread, threads) on each of `threads` threads, of which the calling one is the first.
template <class Work>
void in_parallel(int threads, Work work) {
    if (threads <= 1) {
        work(0, 1);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
#else
    run_on_ggml_threads(threads, work);
#endif
}

// Calls work(i) for every i below `count`; whoever is free takes the next.
template <class Work>
void for_each_in_parallel(int threads, std::int64_t count, Work work) {
    std::atomic<std::int64_t> next{0};
    in_parallel(static_cast<int>(std::min<std::int64_t>(threads, count)), [&](int, int) {
        for (std::int64_t i = next++; i < count; i = next++) {
            work(i);
        }
    });
}

// The same for rows of numbers, of which a few are done sooner than other threads have begun.
template <class Work>
void for_each_row_in_parallel(int threads, std::int64_t rows, Work work) {
    constexpr std::int64_t kRowsOfThread = 4;
    for_each_in_parallel(static_cast<int>(std::min<std::int64_t>(threads, (rows + kRowsOfThread - 1) / kRowsOfThread)), rows, work);
}

}  // namespace llama_moe::experts
