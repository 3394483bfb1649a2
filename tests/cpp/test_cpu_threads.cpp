// The threads that compute on the CPU, and how the expert backend gets them where it is built without OpenMP.
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "cpu_threads.h"
#include "ggml_threads.h"
#include "llama_moe/device.h"
#include "test_support.h"

using llama_moe::CpuThreads;
using llama_moe::experts::run_on_ggml_threads;
using namespace test;

namespace {

// Whether each of `threads` threads was there, once, and the calling one was the first. `seen`: which they were.
bool all_come(int threads, std::set<std::thread::id>* seen = nullptr) {
    const auto caller = std::this_thread::get_id();
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(threads));
    std::atomic<bool> right{true};
    std::mutex mutex;
    run_on_ggml_threads(threads, [&](int thread, int all) {
        calls[static_cast<std::size_t>(thread)]++;
        right = right && all == threads && (thread == 0) == (std::this_thread::get_id() == caller);
        const std::lock_guard<std::mutex> lock(mutex);
        if (seen) {
            seen->insert(std::this_thread::get_id());
        }
    });
    for (const auto& count : calls) {
        right = right && count == 1;
    }
    return right;
}

}  // namespace

TEST_CASE("work is done on the threads of a pool, which stay the same") {
    llama_moe::start_backend();
    const CpuThreads pool(4);
    std::set<std::thread::id> seen;
    for (int use = 0; use < 3; use++) {
        const CpuThreads::Use scope(pool);
        for (int round = 0; round < 100; round++) {
            REQUIRE(all_come(4, &seen));
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    CHECK(seen.size() == 4);
}

TEST_CASE("as many threads of a pool work as are wanted") {
    llama_moe::start_backend();
    const CpuThreads pool(4);
    const CpuThreads::Use scope(pool);
    for (int round = 0; round < 100; round++) {
        REQUIRE(all_come(1 + round % 4));
    }
}

TEST_CASE("two pools are used in turn and side by side") {
    llama_moe::start_backend();
    const CpuThreads one(2);
    const CpuThreads other(3);
    for (int round = 0; round < 20; round++) {
        const CpuThreads::Use outer(one);
        REQUIRE(all_come(2));
        {
            const CpuThreads::Use inner(other);
            REQUIRE(all_come(3));
        }
        REQUIRE(all_come(2));
    }
    std::atomic<int> right{0};
    const auto use = [&](const CpuThreads& pool, int threads) {
        const CpuThreads::Use scope(pool);
        for (int round = 0; round < 50; round++) {
            right += all_come(threads);
        }
    };
    std::thread beside([&] { use(one, 2); });
    use(other, 3);
    beside.join();
    CHECK(right == 100);
}

TEST_CASE("without a pool the threads of some work are made for it") {
    for (const int threads : {1, 2, 5}) {
        CHECK(all_come(threads));
    }
}
