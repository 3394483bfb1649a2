#include "request.h"

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

double seconds_between(Clock::time_point begin, Clock::time_point end) {
    return begin == Clock::time_point{} || end == Clock::time_point{} ? 0.0 : std::chrono::duration<double>(end - begin).count();
}

}  // namespace

Request::Request(RequestKind request_kind, std::vector<std::int32_t> prompt, const SamplingOptions& options, const SamplingVocabulary& vocabulary,
                 int context_size)
    : kind(request_kind),
      prompt_size(prompt.size()),
      max_tokens(options.max_tokens),
      logprobs(options.logprobs),
      sampler(options, vocabulary, context_size),
      assembler(options.stop),
      tokens(std::move(prompt)) {
    sampler.accept_prompt(tokens);
}

void Request::deliver(std::vector<GeneratedToken> pieces) {
    if (pieces.empty()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex);
    if (finished) {
        return;
    }
    for (auto& piece : pieces) {
        ready.push_back(std::move(piece));
    }
    changed.notify_all();
}

void Request::record_timings() {
    const auto now = Clock::now();
    const Clock::time_point begin = started;
    const Clock::time_point first = first_token;
    result.prompt_tokens = static_cast<int>(prompt_size);
    result.cached_tokens = cached_tokens;
    result.completion_tokens = generated;
    result.queue_seconds = seconds_between(submitted, begin == Clock::time_point{} ? now : begin);
    result.prompt_seconds = seconds_between(begin, first == Clock::time_point{} ? now : first);
    result.decode_seconds = seconds_between(first, now);
    result.time_to_first_token = seconds_between(submitted, first);
}

bool Request::finish(const std::string& reason) {
    std::lock_guard<std::mutex> lock(mutex);
    if (finished) {
        return false;
    }
    record_timings();
    result.finish_reason = reason;
    finished = true;
    changed.notify_all();
    return true;
}

bool Request::fail(std::exception_ptr why) {
    std::lock_guard<std::mutex> lock(mutex);
    if (finished) {
        return false;
    }
    record_timings();
    error = std::move(why);
    finished = true;
    changed.notify_all();
    return true;
}

}  // namespace llama_moe
