#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace llama_moe::experts {

// Threads that help another one. Parts of a graph follow each other within microseconds, so they spin for a while before they sleep.
class ThreadTeam {
   public:
    ThreadTeam() = default;
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    // Calls work(thread, threads) on the calling thread, as 0, and on threads - 1 others; returns when all have. More threads are made as
    // they are needed. If the system has no more, the work is done by those there are.
    void run(int threads, const std::function<void(int thread, int threads)>& work);

    // The team of the calling thread; ends with it. A forked child has a new one, since threads are not forked.
    static ThreadTeam& of_this_thread();

   private:
    void serve(int thread, std::uint64_t seen);
    void grow(int threads);

    std::vector<std::thread> members_;  // threads 1, 2, ...
    std::atomic<std::uint64_t> round_{0};
    std::atomic<int> working_{0};
    // Of a round; written before it begins.
    const std::function<void(int, int)>* work_ = nullptr;
    int threads_ = 0;

    std::mutex mutex_;  // of `stopping_`, and around the beginning of a round
    std::condition_variable begins_;
    bool stopping_ = false;
};

}  // namespace llama_moe::experts
