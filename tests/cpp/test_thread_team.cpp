// The threads that the expert backend has where it is built without OpenMP.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "test_support.h"
#include "thread_team.h"

using llama_moe::experts::ThreadTeam;
using namespace test;

namespace {

// Whether each of `threads` threads was there, once.
bool all_come(ThreadTeam& team, int threads) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(threads));
    team.run(threads, [&](int thread, int all) { calls[static_cast<std::size_t>(thread)] += all; });
    for (const auto& count : calls) {
        if (count != threads) {
            return false;
        }
    }
    return true;
}

}  // namespace

TEST_CASE("a team of threads does each round with as many as are wanted") {
    ThreadTeam team;
    for (int round = 0; round < 300; round++) {
        REQUIRE(all_come(team, 2 + round % 4));
    }
    for (int round = 0; round < 3; round++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));  // its threads are asleep
        REQUIRE(all_come(team, 3));
    }
}

TEST_CASE("every thread has a team of its own") {
    std::vector<std::thread> threads;
    std::atomic<int> right{0};
    for (int i = 0; i < 3; i++) {
        threads.emplace_back([&] {
            bool all = true;
            for (int round = 0; round < 50; round++) {
                all = all && all_come(ThreadTeam::of_this_thread(), 2);
            }
            right += all;
        });
    }
    for (auto& thread : threads) {
        thread.join();
    }
    CHECK(right == 3);
}

#if !defined(__SANITIZE_THREAD__)  // it ends a process that makes threads after such a fork
TEST_CASE("a forked child has a team of its own") {
    REQUIRE(all_come(ThreadTeam::of_this_thread(), 2));
    const pid_t child = fork();
    if (child == 0) {
        _exit(all_come(ThreadTeam::of_this_thread(), 2) ? 0 : 1);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif
