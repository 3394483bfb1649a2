#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "llama_moe/engine.h"
#include "native_context.h"
#include "native_thread.h"
#include "request.h"

namespace llama_moe {

// The engine's thread and what it works on: admit -> batch -> decode -> sample -> deliver. Lives until both the Engine
// and every Generation are gone; the thread itself ends with close().
//
// Locks: `mutex_` guards the queue and the flags. A request's own mutex may be taken while it is held, never the other
// way round. Neither is held during a call into llama.cpp.
class EngineCore : public std::enable_shared_from_this<EngineCore> {
   public:
    EngineCore(std::shared_ptr<LoadedModel> model, const ContextOptions& options);
    ~EngineCore();

    // Starts the thread and waits until its context is there.
    void start(const Poll& poll);
    void submit(const std::shared_ptr<Request>& request);
    // Frees the request's slot at the next step, or at once in the middle of a prompt on the CPU.
    void cancel(Request& request);
    // Runs `task` on the engine's thread between two steps.
    void run(std::function<void(NativeContext&)> task, const Poll& poll);
    // Called by whoever waits: fails all requests when the thread is in a call that can never return.
    void check_lost();
    void close();
    bool closed() const;

    EngineStats stats() const;
    const ContextLimits& limits() const { return limits_; }
    const SamplingVocabulary& vocabulary() const { return vocabulary_; }

   private:
    struct Slot {
        std::shared_ptr<Request> request;
        int output_index = -1;  // this step's row of logits
    };
    struct Task {
        std::function<void(NativeContext&)> work;
        std::exception_ptr error;
        bool done = false;
    };

    void work();
    void serve();
    bool wait_for_work();
    void run_tasks();
    void admit();
    void release_cancelled();
    void fill_batch();
    int decode();
    void decode_failed(int status);
    void sample();
    void sample_slot(std::size_t index);
    std::vector<GeneratedToken> with_logprobs(Request& request, std::vector<TextPiece> pieces) const;
    std::string token_text(std::int32_t token, const Request& request) const;
    void end(std::size_t slot, const std::string& reason);
    void fail_all(const std::exception_ptr& error);
    void check_open() const;
    bool failed() const;
    bool active() const;
    bool should_abort() const;

    std::shared_ptr<LoadedModel> model_;  // given back when the thread ends
    const ContextOptions options_;
    const SamplingVocabulary vocabulary_;
    const std::vector<ggml_backend_dev_t> devices_;  // the model's
    ContextLimits limits_{};

    // Of the engine's thread.
    std::unique_ptr<NativeContext> context_;
    std::unique_ptr<Batch> batch_;
    std::vector<Slot> slots_;
    std::vector<std::shared_ptr<Request>> in_batch_;  // read by should_abort() on a compute thread while decode() runs
    std::size_t next_prompt_slot_ = 0;                // whose prompt goes first, in turn

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::shared_ptr<Request>> waiting_;
    std::deque<std::shared_ptr<Task>> tasks_;
    std::vector<std::shared_ptr<Request>> running_;  // the slots' requests, for check_lost()
    bool started_ = false;
    bool ended_ = false;
    bool closed_ = false;
    std::exception_ptr failure_;  // why the engine cannot be used any more
    std::optional<AbortWatch> native_call_;  // set while the thread is in llama.cpp
    EngineStats stats_;
    std::atomic<bool> stopping_{false};

    std::mutex close_mutex_;
    std::thread thread_;
};

}  // namespace llama_moe
