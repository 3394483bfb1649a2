#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "advance.h"
#include "decoder.h"
#include "request.h"
#include "worker_pool.h"

namespace llama_moe {

// A sequence's tokens with its KV cache, kept in host memory.
struct SavedPrefix {
    std::vector<std::int32_t> tokens;
    std::string state;
};

// Puts many requests into the batches of one decoder: which sequence holds what, what is computed next, and what comes of
// it. Of one thread, but for should_abort().
//
// A request is a list of tokens, and a sequence's cache holds the first of them; the rest is pending, be it a prompt, the
// newest token, or everything because the cache was lost. So prompts, generation, reuse of a prefix and starting again after
// a failure are one thing.
class Scheduler {
   public:
    Scheduler(Decoder& decoder, const SamplingVocabulary& vocabulary, WorkerPool& pool);

    // Whether a request can be admitted now.
    bool accepts() const;
    void admit(std::shared_ptr<Request> request);
    bool active() const;
    std::vector<std::shared_ptr<Request>> running() const;

    // Ends the requests whose consumer left.
    void release_ended();
    // Computes one batch.
    void step();

    struct Ended {
        std::shared_ptr<Request> request;
        std::string reason;
        std::exception_ptr error;
    };
    // The requests that ended since the last call. The caller tells them, when the engine's figures are up to date.
    std::vector<Ended> take_ended() { return std::exchange(ended_, {}); }
    // Requests that had to leave for lack of room in a shared pool; they go on where they were when they are admitted again.
    std::vector<std::shared_ptr<Request>> take_preempted() { return std::exchange(preempted_, {}); }

    // Replaces one of the same tokens.
    void add_saved_prefix(SavedPrefix prefix);
    void clear_saved_prefixes() { saved_prefixes_.clear(); }
    std::uint64_t saved_prefix_bytes() const;

    // Whether nobody waits for the batch that is being computed any more. Called by compute threads while step() runs.
    bool should_abort() const;

    const EngineStats& stats() const { return stats_; }

   private:
    struct Slot {
        std::shared_ptr<Request> request;  // none: idle
        std::vector<std::int32_t> cached;  // what the decoder's sequence holds; stays when the request ends
        std::uint64_t last_used = 0;       // step
        std::uint64_t last_prompt = 0;     // step in which its prompt had a turn
        bool prepared = false;             // its prefix was looked for
        std::vector<std::int32_t> draft;   // for this step
        int first = 0;                     // this step's batch: index of its first token,
        int count = 0;                     // and how many of the request's there are
    };

    std::size_t choose_slot(const std::vector<std::int32_t>& tokens) const;
    void prepare(std::size_t index);
    std::size_t reusable(const Slot& slot, const std::vector<std::int32_t>& tokens) const;
    std::size_t being_computed(std::size_t index) const;
    std::size_t find_saved(const std::vector<std::int32_t>& tokens, std::size_t& length) const;
    void truncate(std::size_t index, std::size_t length);

    void make_drafts();
    void fill_batch();
    int plan_generation();
    void plan_prompts(int room);
    void add_to_batch(std::size_t index);
    DecodeStatus decode();
    bool make_room();
    void batch_failed(DecodeStatus status);

    void take_results();
    void take_advance(std::size_t index, const Advance& advance, std::size_t cached_before);
    void save(std::size_t index);
    void take_embeddings(std::size_t index);
    void end(std::size_t index, const std::string& reason, std::exception_ptr error = nullptr);

    Decoder& decoder_;
    const SamplingVocabulary& vocabulary_;
    WorkerPool& pool_;
    const ContextLimits limits_;
    std::vector<Slot> slots_;
    std::vector<SavedPrefix> saved_prefixes_;
    std::vector<BatchToken> batch_;
    std::vector<const Request*> in_batch_;  // read by should_abort() on compute threads while decode() runs
    bool embedding_batch_ = false;
    bool paused_ = false;  // the shared pool is full: nobody is admitted before somebody ends
    std::uint64_t steps_ = 0;
    std::uint64_t admissions_ = 0;
    std::vector<Ended> ended_;
    std::vector<std::shared_ptr<Request>> preempted_;
    EngineStats stats_;
};

}  // namespace llama_moe
