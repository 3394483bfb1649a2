#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "decoder.h"
#include "llama_moe/engine.h"
#include "loaded_model.h"
#include "native_thread.h"
#include "request.h"
#include "scheduler.h"

namespace llama_moe {

// The engine's thread with its queue: admits requests, runs the scheduler's steps, tells consumers. Lives until both the Engine
// and every Generation are gone; the thread itself ends with close().
//
// Locks: `mutex_` guards the queue and the flags. A request's own mutex may be taken while it is held, never the other
// way round. Neither is held during a call into llama.cpp.
class EngineCore : public std::enable_shared_from_this<EngineCore> {
   public:
    // Makes the decoder, on the engine's thread. The argument tells whether a decode should stop; any thread may ask it.
    using MakeDecoder = std::function<std::unique_ptr<Decoder>(std::function<bool()> should_abort)>;

    EngineCore(std::shared_ptr<LoadedModel> model, const EngineOptions& options, std::vector<ggml_backend_dev_t> devices, MakeDecoder make_decoder);
    ~EngineCore();

    // Starts the thread and waits until its decoder is there.
    void start(const Poll& poll);
    // Throws QueueFullError when the queue is full; with `wait`, waits for room.
    void submit(const std::shared_ptr<Request>& request, bool wait, const Poll& poll);
    // Frees the request's slot at the next step, or at once in the middle of a prompt on the CPU.
    void cancel(Request& request);
    // Runs `task` on the engine's thread between two steps.
    void run(std::function<void(Decoder&, Scheduler&)> task, const Poll& poll);
    // Called by whoever waits: fails all requests when the thread is in a call that can never return.
    void check_lost();
    // A poll that does that first.
    Poll checked(const Poll& poll);
    void close();
    bool closed() const;
    bool lost() const;

    EngineStats stats() const;
    const ContextLimits& limits() const { return limits_; }
    const SamplingVocabulary& vocabulary() const { return vocabulary_; }

   private:
    struct Task {
        std::function<void(Decoder&, Scheduler&)> work;
        std::exception_ptr error;
        bool done = false;
    };

    void work();
    void serve();
    bool wait_for_work();
    void run_tasks();
    void admit();
    void tell_ended();
    void set_native_call(bool running);
    void fail_all(const std::exception_ptr& error);
    void check_open() const;
    bool failed() const;

    std::shared_ptr<LoadedModel> model_;  // given back when the thread ends
    const EngineOptions options_;
    const SamplingVocabulary vocabulary_;
    const std::vector<ggml_backend_dev_t> devices_;  // those that the decoder uses
    MakeDecoder make_decoder_;  // keeps the model: gone when it has been used
    ContextLimits limits_{};

    // Of the engine's thread.
    std::unique_ptr<Decoder> decoder_;
    std::unique_ptr<WorkerPool> pool_;
    std::unique_ptr<Scheduler> scheduler_;

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::shared_ptr<Request>> waiting_;
    std::deque<std::shared_ptr<Task>> tasks_;
    std::vector<std::shared_ptr<Request>> running_;  // the scheduler's requests, for check_lost()
    bool started_ = false;
    bool ended_ = false;
    bool closed_ = false;
    std::exception_ptr failure_;  // why the engine cannot be used any more
    std::optional<AbortWatch> native_call_;  // set while the thread is in llama.cpp
    EngineStats stats_;
    std::uint64_t submitted_ = 0;
    std::uint64_t ended_waiting_ = 0;  // requests that ended without ever being admitted
    std::atomic<bool> stopping_{false};

    std::mutex close_mutex_;
    std::thread thread_;
};

}  // namespace llama_moe
