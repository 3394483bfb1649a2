#include "native_thread.h"

#include <atomic>
#include <chrono>
#include <future>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ggml.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "test_support.h"

using namespace llama_moe;
using test::contains;

namespace {

using Clock = std::chrono::steady_clock;

// What a poll throws for Ctrl-C.
struct Interrupt : std::runtime_error {
    Interrupt() : std::runtime_error("interrupted") {}
};

// Aborts on a thread that is not ours, and waits for it: neither ever ends.
void abort_elsewhere(const char* message) {
    std::thread([message] { GGML_ABORT("%s", message); }).join();
}

// The parked thread has said so. There is no event to wait for: that thread only stops.
void wait_for_abort(const std::string& message) {
    const auto deadline = Clock::now() + std::chrono::seconds(60);
    while (!contains(AbortWatch::message(), message) && Clock::now() < deadline) {
        std::this_thread::yield();
    }
    REQUIRE(contains(AbortWatch::message(), message));
}

// The same for both ways to run a task.
using Run = std::function<void(std::function<void()>, const Poll&, const std::function<void()>&)>;

void for_both(const std::function<void(const Run&)>& check) {
    NativeThread thread;
    check([&](auto task, const auto& poll, const auto& interrupt) { thread.run(std::move(task), poll, interrupt); });
    check([](auto task, const auto& poll, const auto& interrupt) { run_native(std::move(task), poll, interrupt); });
}

}  // namespace

TEST_CASE("a native task runs on another thread, and its exception is the caller's") {
    for_both([](const Run& run) {
        std::thread::id ran_on;
        run([&] { ran_on = std::this_thread::get_id(); }, {}, {});
        CHECK(ran_on != std::thread::id() && ran_on != std::this_thread::get_id());
        CHECK_EQ(CHECK_THROWS(PlacementError, run([] { throw PlacementError("no device"); }, {}, {})), "no device");
        run([] {}, {}, {});  // the next one is not affected
    });
}

TEST_CASE("a NativeThread runs tasks one at a time and in order") {
    NativeThread thread;
    std::vector<int> order;
    std::promise<void> started;
    std::promise<void> go_on;
    std::thread first([&] {
        thread.run([&] {
            started.set_value();
            go_on.get_future().wait();
            order.push_back(0);
        });
    });
    started.get_future().wait();
    // The others queue behind the first; each is queued before the next one is, as its poll tells.
    std::vector<std::thread> callers;
    for (int i = 1; i <= 3; i++) {
        auto queued = std::make_shared<std::promise<void>>();
        auto is_queued = queued->get_future();
        callers.emplace_back([&thread, &order, queued, i] {
            bool told = false;
            const auto tell = [&] {
                if (!std::exchange(told, true)) {
                    queued->set_value();
                }
            };
            thread.run([&order, i] { order.push_back(i); }, tell);
        });
        is_queued.wait();
    }
    go_on.set_value();
    first.join();
    for (auto& caller : callers) {
        caller.join();
    }
    CHECK_EQ(order, (std::vector<int>{0, 1, 2, 3}));
}

TEST_CASE("a NativeThread serves many callers at once") {
    NativeThread thread;
    int sum = 0;  // no atomic: the tasks are on one thread
    std::vector<std::thread> callers;
    for (int i = 0; i < 8; i++) {
        callers.emplace_back([&] {
            for (int k = 0; k < 200; k++) {
                thread.run([&] { sum++; });
            }
        });
    }
    for (auto& caller : callers) {
        caller.join();
    }
    CHECK_EQ(sum, 8 * 200);
}

TEST_CASE("a poll that throws leaves early, interrupts, and the task still owns what it uses") {
    for_both([](const Run& run) {
        auto data = std::make_shared<std::vector<int>>(1000, 7);
        const std::weak_ptr<std::vector<int>> watched = data;
        std::promise<void> go_on;
        auto result = std::make_shared<std::promise<int>>();
        auto value = result->get_future();
        bool interrupted = false;
        const auto begin = Clock::now();
        CHECK_THROWS(Interrupt, run(
                                    [data = std::move(data), gate = go_on.get_future().share(), result] {
                                        gate.wait();
                                        result->set_value(data->at(999));
                                    },
                                    [] { throw Interrupt(); }, [&] { interrupted = true; }));
        CHECK(interrupted);
        CHECK(Clock::now() - begin < std::chrono::seconds(20));
        CHECK(!watched.expired());
        go_on.set_value();
        CHECK_EQ(value.get(), 7);
    });
}

TEST_CASE("an interrupt that stops the task in time leaves nothing running") {
    for_both([](const Run& run) {
        auto stop = std::make_shared<std::promise<void>>();
        auto ended = std::make_shared<std::atomic<bool>>(false);
        CHECK_THROWS(Interrupt, run(
                                    [stop, ended] {
                                        stop->get_future().wait();
                                        *ended = true;
                                    },
                                    [] { throw Interrupt(); }, [stop] { stop->set_value(); }));
        CHECK(ended->load());
    });
}

TEST_CASE("a task's captures are freed on its thread before the caller goes on") {
    for_both([](const Run& run) {
        struct Owner {
            std::thread::id& freed_on;
            ~Owner() { freed_on = std::this_thread::get_id(); }
        };
        std::thread::id freed_on;
        std::thread::id ran_on;
        auto owner = std::make_shared<Owner>(Owner{freed_on});
        freed_on = {};
        run([owner = std::move(owner), &ran_on] { ran_on = std::this_thread::get_id(); }, {}, {});
        CHECK(ran_on != std::thread::id() && freed_on == ran_on);
    });
}

TEST_CASE("the destructor of a NativeThread waits for what runs") {
    std::promise<void> started;
    std::promise<void> go_on;
    std::atomic<bool> ended{false};
    auto thread = std::make_unique<NativeThread>();
    CHECK_THROWS(Interrupt, thread->run(
                                [&] {
                                    started.set_value();
                                    go_on.get_future().wait();
                                    ended = true;
                                },
                                [] { throw Interrupt(); }));
    started.get_future().wait();
    std::thread opener([&] { go_on.set_value(); });
    thread.reset();
    CHECK(ended.load());
    opener.join();
}

TEST_CASE("an abort of ggml inside a NativeScope is a NativeAbort, through ggml's frames") {
    start_backend();
    const NativeScope outer;
    {
        const NativeScope inner;
        CHECK(contains(CHECK_THROWS(NativeAbort, GGML_ABORT("number %d", 7)), "number 7"));
    }
    // The scope that is left was not the last one. An assertion of ggml.c itself.
    const std::unique_ptr<ggml_context, void (*)(ggml_context*)> context(ggml_init({1024, nullptr, true}), ggml_free);
    CHECK(contains(CHECK_THROWS(NativeAbort, ggml_new_tensor(context.get(), GGML_TYPE_F32, 0, nullptr)), "GGML_ASSERT(n_dims >= 1"));
}

TEST_CASE("an abort of ggml in a native task is the caller's exception, and the thread goes on") {
    start_backend();
    for_both([](const Run& run) {
        CHECK(contains(CHECK_THROWS(NativeAbort, run([] { GGML_ABORT("no room"); }, {}, {})), "no room"));
        bool ran = false;
        run([&] { ran = true; }, {}, {});
        CHECK(ran);
    });
}

ISOLATED_TEST_CASE("an abort on a foreign thread parks it, and a watch made before gives up after its grace") {
    start_backend();
    AbortWatch before;
    CHECK(!before.gave_up());
    std::thread([] { GGML_ABORT("worker is gone"); }).detach();
    wait_for_abort("worker is gone");
    AbortWatch after;
    const auto noticed = Clock::now();
    CHECK(!before.gave_up());  // the grace begins
    while (!before.gave_up()) {
        REQUIRE(Clock::now() - noticed < std::chrono::seconds(60));
        std::this_thread::yield();
    }
    CHECK(Clock::now() - noticed > std::chrono::milliseconds(1900));
    CHECK(!after.gave_up());
}

ISOLATED_TEST_CASE("a task whose foreign thread aborted is a DecodeError, and its thread is lost") {
    start_backend();
    NativeThread other;  // idle: not lost with the first
    auto thread = std::make_unique<NativeThread>();
    CHECK(contains(CHECK_THROWS(DecodeError, thread->run([] { abort_elsewhere("device died"); })), "device died"));
    CHECK(thread->lost());
    const auto begin = Clock::now();
    CHECK(contains(CHECK_THROWS(DecodeError, thread->run([] {})), "device died"));
    CHECK(Clock::now() - begin < std::chrono::seconds(1));  // known by now: no grace
    thread.reset();
    CHECK(!other.lost());
    bool ran = false;
    other.run([&] { ran = true; });
    CHECK(ran);
    CHECK(contains(CHECK_THROWS(DecodeError, run_native([] { abort_elsewhere("another died"); })), "another died"));
}

ISOLATED_TEST_CASE("a task behind one that will never end fails with it, also when it came after the abort") {
    start_backend();
    NativeThread thread;
    std::promise<std::string> first;
    std::thread caller([&] { first.set_value(CHECK_THROWS(DecodeError, thread.run([] { abort_elsewhere("hung device"); }))); });
    wait_for_abort("hung device");
    // During the grace nobody knows yet.
    CHECK(!thread.lost());
    CHECK(contains(CHECK_THROWS(DecodeError, thread.run([] {})), "hung device"));
    CHECK(contains(first.get_future().get(), "hung device"));
    caller.join();
}

ISOLATED_TEST_CASE("a thread is found to be lost after the caller of the task that hangs has left") {
    start_backend();
    for (const char* message : {"first", "second"}) {
        auto thread = std::make_unique<NativeThread>();
        const auto poll = [&] {
            wait_for_abort(message);
            throw Interrupt();
        };
        CHECK_THROWS(Interrupt, thread->run([message] { abort_elsewhere(message); }, poll));
        CHECK(!thread->lost());
        if (message == std::string("first")) {
            CHECK_THROWS(DecodeError, thread->run([] {}));
        }
        thread.reset();  // ends, though nobody asked for the second
    }
}
