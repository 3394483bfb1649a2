#include "request.h"

#include <algorithm>
#include <iterator>

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

// Times beyond this are none to a clock that counts nanoseconds.
constexpr double kNoTimeout = 1e9;

std::string seconds_text(double seconds) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", seconds);
    return text;
}

Clock::time_point deadline_of(Clock::time_point submitted, const std::optional<double>& timeout) {
    if (!timeout || *timeout > kNoTimeout) {
        return Clock::time_point::max();
    }
    return submitted + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(*timeout));
}

double seconds_between(Clock::time_point begin, Clock::time_point end) {
    return begin == Clock::time_point{} || end == Clock::time_point{} ? 0.0 : std::chrono::duration<double>(end - begin).count();
}

}  // namespace

void DeliveryOptions::validate() const {
    if (timeout && !(*timeout > 0)) {
        throw InvalidOptionError("timeout is " + seconds_text(*timeout) + "; it must be a number of seconds above 0");
    }
}

Request::Request(RequestKind request_kind, std::vector<std::int32_t> prompt, const SamplingOptions& options, const SamplingVocabulary& vocabulary,
                 int context_size, const DeliveryOptions& delivery)
    : kind(request_kind),
      prompt_size(prompt.size()),
      max_tokens(options.max_tokens),
      logprobs(options.logprobs),
      preserved_tokens(options.preserved_tokens),
      timeout(delivery.timeout),
      deadline(deadline_of(submitted, timeout)),
      tag(delivery.tag),
      sampler(options, vocabulary, context_size),
      assembler(options.stop),
      tokens(std::move(prompt)),
      notifier(delivery.notifier) {
    sampler.accept_prompt(tokens);
}

void Request::deliver(std::vector<GeneratedToken> pieces) {
    if (pieces.empty()) {
        return;
    }
    std::unique_lock<std::mutex> lock(mutex);
    if (finished) {
        return;
    }
    std::move(pieces.begin(), pieces.end(), std::back_inserter(ready));
    announce(std::move(lock));
}

void Request::announce(std::unique_lock<std::mutex> lock) {
    const bool wake = waiting_threads > 0;
    const bool tell = std::exchange(notify, false);
    const auto told = finished ? std::move(notifier) : tell ? notifier : nullptr;
    lock.unlock();
    if (wake) {
        changed.notify_all();
    }
    if (tell) {
        told->notify(tag);
    }
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
    std::unique_lock<std::mutex> lock(mutex);
    if (finished) {
        return false;
    }
    record_timings();
    result.finish_reason = reason;
    finished = true;
    announce(std::move(lock));
    return true;
}

bool Request::fail(std::exception_ptr why) {
    std::unique_lock<std::mutex> lock(mutex);
    if (finished) {
        return false;
    }
    record_timings();
    error = std::move(why);
    finished = true;
    announce(std::move(lock));
    return true;
}

bool Request::fail_by_timeout() {
    const std::string state = started.load() == Clock::time_point{} ? "it still waited for a free sequence"
                              : generated == 0                      ? "its prompt was being computed"
                                                                    : "it had generated " + std::to_string(generated) + " tokens";
    return fail(std::make_exception_ptr(TimeoutError("the request did not end within its timeout of " + seconds_text(*timeout) + " s; " + state)));
}

bool Request::given_up() {
    if (cancelled) {
        return true;
    }
    if (!past_deadline()) {
        return false;
    }
    fail_by_timeout();
    return true;
}

}  // namespace llama_moe
