#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace llama_moe {

// Ends the threads that OpenMP keeps for the calling one, until it computes again.
void end_openmp_threads();

// Waits until there is work, without OpenMP's threads if it takes long. Wherever more of these exist in a process than processors, those of
// everybody sleep and are woken at each step of a graph, where they would spin: an engine that only waits would make every other one of its
// process half as fast (measured with GCC's library).
template <class HasWork>
void wait_for_work(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, HasWork has_work) {
    constexpr std::chrono::milliseconds kLong{20};  // who asks for one thing after the other does not wait for new threads
    if (!changed.wait_for(lock, kLong, has_work)) {
        lock.unlock();
        end_openmp_threads();
        lock.lock();
        changed.wait(lock, has_work);
    }
}

}  // namespace llama_moe
