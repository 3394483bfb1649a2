#pragma once

#include <chrono>
#include <thread>

namespace test {

// For what another thread does without telling: true as soon as `holds()` is, false when it never is.
template <typename Condition>
bool eventually(Condition holds) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!holds()) {
        if (std::chrono::steady_clock::now() > deadline) {
            return false;
        }
        std::this_thread::yield();
    }
    return true;
}

}  // namespace test
