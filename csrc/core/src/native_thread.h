#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "failed_devices.h"
#include "ggml-backend.h"
#include "llama_moe/error.h"
#include "llama_moe/wait.h"

namespace llama_moe {

// ggml ends the process on a failed assertion. Inside a NativeScope it throws this instead, through ggml's frames; what
// was thrown through is in an unknown state and must not be used again.
class NativeAbort : public Error {
    using Error::Error;
};

// Routes ggml's abort to this file. Idempotent.
void install_abort_handler();

// Marks this thread as one where an abort may throw. Every call into llama.cpp is made inside one.
class NativeScope {
   public:
    NativeScope();
    ~NativeScope();
    NativeScope(const NativeScope&) = delete;
    NativeScope& operator=(const NativeScope&) = delete;
};

// Aborts on threads that are not ours (ggml's RPC client, its compute threads) cannot be thrown: the thread is parked
// for good, and whoever waits for it would wait for ever. A watch made before a call tells when that has happened.
class AbortWatch {
   public:
    // `devices`: those that the call may use.
    explicit AbortWatch(std::vector<ggml_backend_dev_t> devices = {});
    // True once some foreign thread was parked after this watch was made and a grace period has passed since. The
    // grace period lets calls that had nothing to do with that thread end. True at once when one of the devices has failed,
    // and when one, asked because the call takes long, does not answer (failed_devices.h).
    bool gave_up();
    // Why, for people: the devices that failed, or else the abort.
    std::string reason() const;
    // The last abort of a foreign thread.
    static std::string message();

   private:
    using Clock = std::chrono::steady_clock;
    bool aborted();
    bool unanswered();
    void ask(const std::vector<ggml_backend_dev_t>& devices);

    std::vector<ggml_backend_dev_t> devices_;
    std::uint64_t seen_;
    Clock::time_point noticed_{};
    Clock::time_point heard_ = Clock::now();  // when the call began, or all workers answered
    Clock::time_point asked_{};
    std::unique_ptr<Ping> ping_;
};

// A thread of ours that makes llama.cpp calls one after the other, so that callers can wait with a poll, leave early,
// and survive calls that never return.
class NativeThread {
   public:
    explicit NativeThread(std::vector<ggml_backend_dev_t> devices = {});  // those that its tasks may use
    // Waits for what runs, unless that will never end; for workers no longer than kCloseLimit.
    ~NativeThread();
    NativeThread(const NativeThread&) = delete;
    NativeThread& operator=(const NativeThread&) = delete;

    // Runs `task` there and waits; rethrows what it throws. When `poll` throws, calls `interrupt` and leaves with that
    // exception soon after, whether or not the task has ended: a task owns all it touches. Throws DecodeError when the
    // call can never return.
    void run(std::function<void()> task, const Poll& poll = {}, const std::function<void()>& interrupt = {});

    // A call on this thread will never return. Everything it used must stay allocated for ever.
    bool lost() const;

   private:
    struct Job;
    struct Shared;
    std::shared_ptr<Shared> shared_;
    std::thread thread_;
};

// Runs `task` on a thread made for it: for calls that may never return, such as those to a remote worker.
void run_native(std::function<void()> task, const Poll& poll = {}, const std::function<void()>& interrupt = {},
                std::vector<ggml_backend_dev_t> devices = {});

}  // namespace llama_moe
