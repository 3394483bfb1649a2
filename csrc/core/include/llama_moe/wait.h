#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

namespace llama_moe {

// Called about every kPollInterval by a thread that waits for native work, with no lock held. It may throw (the
// bindings throw KeyboardInterrupt here); the wait then ends with that exception.
using Poll = std::function<void()>;

constexpr std::chrono::milliseconds kPollInterval{50};

// Waits until `ready()` holds, calling `poll` in between. `lock` is held on return and while `ready` runs.
template <typename Ready>
void wait_with_poll(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, const Poll& poll, Ready ready) {
    while (!changed.wait_for(lock, kPollInterval, ready)) {
        if (poll) {
            lock.unlock();
            poll();
            lock.lock();
        }
    }
}

}  // namespace llama_moe
