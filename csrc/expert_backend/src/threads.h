#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

// Threads: OpenMP's, because ggml's CPU backend has them too. Its threads spin for a while when a part of a graph is done; threads of our own
// would compete with those for the cores, while the same ones just go on. Built without OpenMP, everything runs on the calling thread.
namespace llama_moe::experts {

inline int all_threads() {
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls work(thread, threads) on each of `threads` threads.
template <class Work>
void in_parallel(int threads, Work work) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    work(0, 1);
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

}  // namespace llama_moe::experts
