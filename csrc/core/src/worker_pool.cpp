#include "worker_pool.h"

#include <string>
#include <system_error>

#include "llama_moe/log.h"
#include "native_thread.h"

namespace llama_moe {

WorkerPool::WorkerPool(int threads) {
    try {
        for (int i = 1; i < threads; i++) {
            threads_.emplace_back([this] { work(); });
        }
    } catch (const std::system_error& error) {
        log_line(LogLevel::warning, std::string("fewer threads for sampling than wanted: ") + error.what());
    }
}

WorkerPool::~WorkerPool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    begun_.notify_all();
    for (auto& thread : threads_) {
        thread.join();
    }
}

void WorkerPool::take_items(std::unique_lock<std::mutex>& lock) {
    while (next_ < count_) {
        const int item = next_++;
        lock.unlock();
        (*task_)(item);
        lock.lock();
        done_++;
    }
}

void WorkerPool::work() {
    const NativeScope scope;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        begun_.wait(lock, [&] { return stopping_ || next_ < count_; });
        if (stopping_) {
            return;
        }
        take_items(lock);
        if (done_ == count_) {
            ended_.notify_all();
        }
    }
}

// The caller waits for items, not for threads: one that wakes late finds nothing left and costs nothing.
void WorkerPool::run(int count, const std::function<void(int)>& task) {
    if (count < 2 || threads_.empty()) {
        for (int i = 0; i < count; i++) {
            task(i);
        }
        return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = &task;
    count_ = count;
    next_ = 0;
    done_ = 0;
    begun_.notify_all();
    take_items(lock);
    ended_.wait(lock, [&] { return done_ == count_; });
}

}  // namespace llama_moe
