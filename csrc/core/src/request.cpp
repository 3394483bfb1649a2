#include "request.h"

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

double seconds_between(Clock::time_point begin, Clock::time_point end) {
    return begin == Clock::time_point{} || end == Clock::time_point{} ? 0.0 : std::chrono::duration<double>(end - begin).count();
}

}  // namespace

Request::Request(std::vector<std::int32_t> prompt_tokens, const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size)
    : prompt(std::move(prompt_tokens)),
      max_tokens(options.max_tokens),
      logprobs(options.logprobs),
      preserved_tokens(options.preserved_tokens),
      sampler(options, vocabulary, context_size),
      assembler(options.stop) {
    sampler.accept_prompt(prompt);
}

void Request::deliver(std::vector<GeneratedToken> tokens) {
    if (tokens.empty()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex);
    if (finished) {
        return;
    }
    for (auto& token : tokens) {
        ready.push_back(std::move(token));
    }
    changed.notify_all();
}

void Request::record_timings() {
    const auto now = Clock::now();
    const Clock::time_point begin = started;
    const Clock::time_point first = first_token;
    result.prompt_tokens = static_cast<int>(prompt.size());
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
