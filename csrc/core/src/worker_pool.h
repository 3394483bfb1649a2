#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace llama_moe {

// Threads that share the items of a loop with the calling one.
class WorkerPool {
   public:
    explicit WorkerPool(int threads);  // the calling one included
    ~WorkerPool();
    WorkerPool(const WorkerPool&) = delete;
    WorkerPool& operator=(const WorkerPool&) = delete;

    // Calls task(0) to task(count - 1), in any order, and returns when all have ended. `task` must not throw.
    void run(int count, const std::function<void(int)>& task);

   private:
    void work();
    void take_items(std::unique_lock<std::mutex>& lock);

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable begun_;
    std::condition_variable ended_;
    const std::function<void(int)>* task_ = nullptr;
    int count_ = 0;
    int next_ = 0;  // item that nobody took yet
    int done_ = 0;
    bool stopping_ = false;
};

}  // namespace llama_moe
