#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

namespace llama_moe {

// Called about every kPollInterval by a thread that waits for native work, with no lock held. It may throw (the
// bindings throw KeyboardInterrupt here); the wait then ends with that exception.
using Poll = std::function<void()>;

constexpr std::chrono::milliseconds kPollInterval{50};

// Waits until `ready()` holds, calling `poll` in between. `lock` is held on return and while `ready` runs. False: it does not
// hold, and `deadline` has passed.
template <typename Ready>
bool wait_with_poll(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, const Poll& poll, Ready ready,
                    std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max()) {
    using Clock = std::chrono::steady_clock;
    while (!changed.wait_until(lock, std::min(deadline, Clock::now() + kPollInterval), ready)) {
        if (Clock::now() >= deadline) {
            return false;
        }
        if (poll) {
            lock.unlock();
            poll();
            lock.lock();
        }
    }
    return true;
}

}  // namespace llama_moe
