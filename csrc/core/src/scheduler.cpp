#include "scheduler.h"

#include <algorithm>
#include <new>

#include "llama_moe/error.h"
#include "llama_moe/log.h"

namespace llama_moe {
namespace {

using Tokens = std::vector<std::int32_t>;

// Sampling so many logits in all is worth waking other threads for.
constexpr int kParallelLogits = 1 << 16;

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::size_t common_prefix(const Tokens& a, const Tokens& b) {
    const auto size = static_cast<Tokens::difference_type>(std::min(a.size(), b.size()));
    return static_cast<std::size_t>(std::mismatch(a.begin(), a.begin() + size, b.begin()).first - a.begin());
}

// How many of a request's tokens have to be in the cache: a score needs no logits after the last one.
std::size_t wanted(const Request& request) {
    return request.kind == RequestKind::score ? request.tokens.size() - 1 : request.tokens.size();
}

bool can_reuse(const Request& request) {
    return request.kind == RequestKind::generate || request.kind == RequestKind::save;
}

}  // namespace

Scheduler::Scheduler(Decoder& decoder, const SamplingVocabulary& vocabulary, WorkerPool& pool)
    : decoder_(decoder), vocabulary_(vocabulary), pool_(pool), limits_(decoder.limits()), slots_(static_cast<std::size_t>(limits_.max_sequences)) {}

bool Scheduler::accepts() const {
    return !paused_ && std::any_of(slots_.begin(), slots_.end(), [](const auto& slot) { return !slot.request; });
}

bool Scheduler::active() const {
    return std::any_of(slots_.begin(), slots_.end(), [](const auto& slot) { return slot.request != nullptr; });
}

std::vector<std::shared_ptr<Request>> Scheduler::running() const {
    std::vector<std::shared_ptr<Request>> requests;
    for (const auto& slot : slots_) {
        if (slot.request) {
            requests.push_back(slot.request);
        }
    }
    return requests;
}

void Scheduler::admit(std::shared_ptr<Request> request) {
    auto& slot = slots_[choose_slot(can_reuse(*request) ? request->tokens : Tokens())];
    if (request->started.load() == Clock::time_point{}) {
        request->started = Clock::now();
    }
    request->order = ++admissions_;
    slot.request = std::move(request);
    slot.prepared = false;
    slot.last_prompt = 0;
    stats_.requests_running++;
}

void Scheduler::release_ended() {
    for (std::size_t i = 0; i < slots_.size(); i++) {
        if (slots_[i].request && slots_[i].request->given_up()) {
            end(i, "cancelled");
        }
    }
}

bool Scheduler::should_abort() const {
    return !in_batch_.empty() && std::all_of(in_batch_.begin(), in_batch_.end(),
                                              [](const auto* request) { return request->cancelled || request->past_deadline(); });
}

// --- which sequence, and what it already holds ------------------------------------------------------------------

// The idle sequence that already holds most of the tokens, if that is most of what it holds, else the one that was idle
// longest: another conversation with the same beginning is left alone, and its beginning is copied.
std::size_t Scheduler::choose_slot(const Tokens& tokens) const {
    std::size_t oldest = slots_.size();
    std::size_t best = slots_.size();
    std::size_t longest = 0;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        const auto& slot = slots_[i];
        if (slot.request) {
            continue;
        }
        if (oldest == slots_.size() || std::make_pair(!slot.cached.empty(), slot.last_used) <
                                           std::make_pair(!slots_[oldest].cached.empty(), slots_[oldest].last_used)) {
            oldest = i;
        }
        const std::size_t length = reusable(slot, tokens);
        if (length > longest && 2 * length >= slot.cached.size()) {
            longest = length;
            best = i;
        }
    }
    return best < slots_.size() ? best : oldest;
}

// How many of the tokens a sequence holds. One is left to compute, since only that gives logits.
std::size_t Scheduler::reusable(const Slot& slot, const Tokens& tokens) const {
    const std::size_t length = std::min(common_prefix(slot.cached, tokens), tokens.size() - 1);
    return decoder_.can_truncate() || length == slot.cached.size() ? length : 0;
}

// The longest beginning of this request's tokens that another one is about to compute.
std::size_t Scheduler::being_computed(std::size_t index) const {
    const auto& request = *slots_[index].request;
    std::size_t longest = 0;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        const auto& other = slots_[i];
        if (i == index || !other.request || !other.prepared || !decoder_.can_truncate()) {
            continue;
        }
        const std::size_t length = std::min(common_prefix(other.request->tokens, request.tokens), request.tokens.size() - 1);
        if (length > other.cached.size()) {
            longest = std::max(longest, length);
        }
    }
    return longest;
}

std::size_t Scheduler::find_saved(const Tokens& tokens, std::size_t& length) const {
    std::size_t found = saved_prefixes_.size();
    for (std::size_t i = 0; i < saved_prefixes_.size(); i++) {
        const auto& saved = saved_prefixes_[i].tokens;
        const std::size_t common = std::min(common_prefix(saved, tokens), tokens.size() - 1);
        if (common > length && (decoder_.can_truncate() || common == saved.size())) {
            length = common;
            found = i;
        }
    }
    return found;
}

// Looks for the longest beginning of a request's tokens that need not be computed, and gets it into its sequence. Leaves the
// request unprepared while another one computes a longer one.
void Scheduler::prepare(std::size_t index) {
    auto& slot = slots_[index];
    Request& request = *slot.request;
    if (!can_reuse(request)) {
        truncate(index, 0);
        slot.prepared = true;
        return;
    }
    // A copy between sequences with buffers of their own moves the whole buffer: computing a few tokens is quicker.
    const std::size_t worth = decoder_.shares_cells() ? 1 : std::max<std::size_t>(16, static_cast<std::size_t>(limits_.context_size) / 256);
    const std::size_t own = reusable(slot, request.tokens);
    std::size_t length = own;
    std::size_t source = index;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        // What a request got that is not prepared yet may still go, and a copy is only made with the next batch.
        const bool stays = i != index && (!slots_[i].request || slots_[i].prepared);
        const std::size_t other = stays ? reusable(slots_[i], request.tokens) : 0;
        if (other > length && other >= own + worth) {
            length = other;
            source = i;
        }
    }
    if (const std::size_t soon = being_computed(index); soon > length && soon >= own + worth) {
        return;
    }
    std::size_t saved_length = length + worth - 1;
    const std::size_t saved = find_saved(request.tokens, saved_length);
    if (saved < saved_prefixes_.size()) {
        const auto& prefix = saved_prefixes_[saved];
        if (decoder_.restore(static_cast<int>(index), prefix.tokens, prefix.state)) {
            slot.cached = prefix.tokens;
            length = saved_length;
        } else {
            slot.cached.clear();
            length = 0;
            if (!decoder_.shares_cells()) {  // there it may only have been for lack of room
                log_line(LogLevel::warning, "a saved prefix could not be restored and is not used any more");
                saved_prefixes_.erase(saved_prefixes_.begin() + static_cast<std::ptrdiff_t>(saved));
            }
        }
    } else if (source != index) {
        decoder_.copy(static_cast<int>(source), static_cast<int>(index));
        slot.cached = slots_[source].cached;
    }
    truncate(index, length);
    slot.prepared = true;
    if (request.generated == 0) {
        request.cached_tokens = static_cast<int>(slot.cached.size());
        stats_.cached_tokens += slot.cached.size();
    }
}

void Scheduler::add_saved_prefix(SavedPrefix prefix) {
    for (auto& saved : saved_prefixes_) {
        if (saved.tokens == prefix.tokens) {
            saved = std::move(prefix);
            return;
        }
    }
    saved_prefixes_.push_back(std::move(prefix));
}

std::uint64_t Scheduler::saved_prefix_bytes() const {
    std::uint64_t bytes = 0;
    for (const auto& saved : saved_prefixes_) {
        bytes += saved.state.size() + saved.tokens.size() * sizeof(std::int32_t);
    }
    return bytes;
}

void Scheduler::truncate(std::size_t index, std::size_t length) {
    auto& cached = slots_[index].cached;
    if (length >= cached.size()) {
        return;
    }
    cached.resize(decoder_.truncate(static_cast<int>(index), static_cast<int>(length)) ? length : 0);
}

// --- one batch ----------------------------------------------------------------------------------------------------

void Scheduler::step() {
    steps_++;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        slots_[i].draft.clear();
        if (slots_[i].request && !slots_[i].prepared) {
            prepare(i);
        }
    }
    make_drafts();
    for (;;) {
        fill_batch();
        if (batch_.empty()) {
            return;
        }
        const DecodeStatus status = decode();
        if (status == DecodeStatus::done) {
            take_results();
            return;
        }
        if (status != DecodeStatus::full || !make_room()) {
            batch_failed(status);
            return;
        }
    }
}

void Scheduler::make_drafts() {
    if (decoder_.max_draft() == 0) {
        return;
    }
    std::vector<Draft> drafts;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        auto& slot = slots_[i];
        if (!slot.request || !slot.prepared || slot.request->kind != RequestKind::generate || slot.request->generated == 0 ||
            wanted(*slot.request) != slot.cached.size() + 1) {
            continue;
        }
        const Request& request = *slot.request;
        int most = std::min(decoder_.max_draft(), limits_.context_size - static_cast<int>(slot.cached.size()) - 1);
        if (request.max_tokens) {
            most = std::min(most, *request.max_tokens - request.generated - 1);
        }
        if (most > 0) {
            drafts.push_back({static_cast<int>(i), &slot.cached, request.tokens.back(), most, &slot.draft});
        }
    }
    if (!drafts.empty()) {
        decoder_.draft(drafts);
    }
}

// First what generates, then prompts in turn, as many tokens as one micro-batch takes: a long prompt holds nobody up for
// longer, and a new one waits for no more than that. Embeddings need batches of their own, in turn with the others. Sequences go
// in the order of their numbers, since llama.cpp computes those together that follow each other. (Closing a gap with a token that
// is thrown away afterwards was measured to cost as much as the pass over the weights that it saves.)
void Scheduler::fill_batch() {
    batch_.clear();
    in_batch_.clear();
    for (auto& slot : slots_) {
        slot.count = 0;
    }
    const auto has = [&](bool embeddings) {
        return std::any_of(slots_.begin(), slots_.end(),
                           [&](const auto& slot) { return slot.request && slot.prepared && (slot.request->kind == RequestKind::embed) == embeddings; });
    };
    embedding_batch_ = has(true) && (!embedding_batch_ || !has(false));
    if (embedding_batch_) {
        plan_prompts(std::min(limits_.micro_batch_size, decoder_.max_outputs()));
    } else {
        const int generating = plan_generation();
        const int least = std::max(1, limits_.micro_batch_size / 8);  // more sequences than a micro-batch has places
        plan_prompts(std::min(std::max(least, limits_.micro_batch_size - generating), limits_.batch_size - generating));
    }
    for (std::size_t i = 0; i < slots_.size(); i++) {
        if (slots_[i].count > 0) {
            add_to_batch(i);
        }
    }
}

// Returns how many tokens that makes.
int Scheduler::plan_generation() {
    int tokens = 0;
    for (auto& slot : slots_) {
        if (slot.request && slot.prepared && slot.request->kind == RequestKind::generate && wanted(*slot.request) == slot.cached.size() + 1) {
            slot.count = 1;
            tokens++;
        }
    }
    // Drafts are for idle capacity: half of the micro-batch is for prompts, where there are some.
    const bool prompts = std::any_of(slots_.begin(), slots_.end(), [](const auto& slot) { return slot.request && slot.prepared && slot.count == 0; });
    const int most = prompts ? limits_.micro_batch_size / 2 : limits_.batch_size;
    for (auto& slot : slots_) {
        if (slot.count > 0) {
            slot.draft.resize(std::min(slot.draft.size(), static_cast<std::size_t>(std::max(0, most - tokens))));
            tokens += static_cast<int>(slot.draft.size());
        }
    }
    return tokens;
}

void Scheduler::plan_prompts(int room) {
    std::vector<Slot*> prompts;
    for (auto& slot : slots_) {
        if (slot.request && slot.prepared && slot.count == 0 && (slot.request->kind == RequestKind::embed) == embedding_batch_) {
            prompts.push_back(&slot);
        }
    }
    std::sort(prompts.begin(), prompts.end(), [](const Slot* a, const Slot* b) {
        return std::make_pair(a->last_prompt, a->request->order) < std::make_pair(b->last_prompt, b->request->order);
    });
    // What scores may take of the rows of logits: all that those who generate may not need.
    const auto scores = std::count_if(slots_.begin(), slots_.end(),
                                      [](const auto& slot) { return slot.request && slot.request->kind == RequestKind::score; });
    int rows = decoder_.max_outputs() - (limits_.max_sequences - static_cast<int>(scores)) * (1 + decoder_.max_draft());
    for (auto* slot : prompts) {
        int count = static_cast<int>(std::min(wanted(*slot->request) - slot->cached.size(), static_cast<std::size_t>(std::max(0, room))));
        if (slot->request->kind == RequestKind::score) {
            count = std::min(count, rows);
            rows -= count;
        }
        if (count > 0) {
            slot->count = count;
            slot->last_prompt = steps_;
            room -= count;
        }
    }
}

void Scheduler::add_to_batch(std::size_t index) {
    auto& slot = slots_[index];
    const Request& request = *slot.request;
    slot.first = static_cast<int>(batch_.size());
    const auto sequence = static_cast<int>(index);
    std::size_t at = slot.cached.size();
    for (int k = 0; k < slot.count; k++, at++) {
        const bool output = request.kind == RequestKind::score || (request.kind == RequestKind::generate && at + 1 == request.tokens.size());
        batch_.push_back({request.tokens[at], static_cast<int>(at), sequence, output, request.number});
    }
    for (const auto token : slot.draft) {
        batch_.push_back({token, static_cast<int>(at++), sequence, true, request.number});
    }
    in_batch_.push_back(&request);
}

DecodeStatus Scheduler::decode() {
    const auto begin = Clock::now();
    const DecodeStatus status = decoder_.decode(batch_, embedding_batch_);
    in_batch_.clear();  // a draft model computes between batches too, when these requests may be gone
    stats_.decode_seconds += seconds_since(begin);
    stats_.decode_calls++;
    return status;
}

// A shared pool is full: first what idle sequences keep has to go, then the request that was admitted last, which goes on later.
// Who is alone has come to the end of its context. Returns whether the batch is worth another try.
bool Scheduler::make_room() {
    if (!decoder_.shares_cells()) {
        return false;
    }
    std::size_t oldest = slots_.size();
    std::size_t youngest = slots_.size();
    int active = 0;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        const auto& slot = slots_[i];
        if (!slot.request && !slot.cached.empty() && (oldest == slots_.size() || slot.last_used < slots_[oldest].last_used)) {
            oldest = i;
        }
        if (slot.request) {
            active++;
            if (youngest == slots_.size() || slot.request->order > slots_[youngest].request->order) {
                youngest = i;
            }
        }
    }
    if (oldest < slots_.size()) {
        truncate(oldest, 0);
        return true;
    }
    auto& slot = slots_[youngest];
    if (active > 1) {
        truncate(youngest, 0);
        slot.request->values.clear();
        preempted_.push_back(std::move(slot.request));
        slot.request.reset();
        slot.draft.clear();
        stats_.requests_preempted++;
        stats_.requests_running--;
        paused_ = true;
        return true;
    }
    if (slot.request->generated == 0) {
        return false;
    }
    deliver_held(*slot.request, vocabulary_);
    end(youngest, "length");
    return true;
}

// Of an aborted batch those go on that somebody still waits for: what was computed of it is computed again. The others of a failed
// batch end with the error.
void Scheduler::batch_failed(DecodeStatus status) {
    const std::string tokens = "a batch of " + std::to_string(batch_.size()) + " tokens";
    const auto error = status == DecodeStatus::full ? std::make_exception_ptr(ContextFullError("the KV cache has no room for " + tokens))
                                                    : std::make_exception_ptr(DecodeError("llama.cpp could not decode " + tokens));
    for (std::size_t i = 0; i < slots_.size(); i++) {
        auto& slot = slots_[i];
        if (slot.count == 0) {
            continue;
        }
        const std::size_t known = status == DecodeStatus::aborted ? slot.cached.size() : 0;
        slot.cached.resize(decoder_.truncate(static_cast<int>(i), static_cast<int>(known)) ? known : 0);
        if (slot.cached.empty()) {
            slot.request->values.clear();
        }
        if (slot.request->given_up()) {
            end(i, "cancelled");
        } else if (status != DecodeStatus::aborted) {
            end(i, "", error);
        }
    }
}

// --- what comes of it ---------------------------------------------------------------------------------------------

void Scheduler::take_results() {
    const auto begin = Clock::now();
    struct Job {
        std::size_t slot;
        std::vector<const float*> rows;
        std::size_t cached_before;
        Advance advance;
    };
    std::vector<Job> jobs;
    std::size_t rows = 0;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        auto& slot = slots_[i];
        if (slot.count == 0) {
            continue;
        }
        const std::size_t before = slot.cached.size();
        const int size = slot.count + static_cast<int>(slot.draft.size());
        Job job{i, {}, before, {}};
        for (int k = slot.first; k < slot.first + size; k++) {
            const auto& token = batch_[static_cast<std::size_t>(k)];
            slot.cached.push_back(token.token);
            if (token.output && !embedding_batch_) {
                job.rows.push_back(decoder_.logits(k));
            }
        }
        slot.last_used = steps_;
        stats_.prompt_tokens += slot.request->generated == 0 ? static_cast<std::uint64_t>(slot.count) : 0;
        if (embedding_batch_) {
            take_embeddings(i);
        } else if (!job.rows.empty()) {
            rows += job.rows.size();
            jobs.push_back(std::move(job));
        } else if (slot.request->kind == RequestKind::save && slot.cached.size() == slot.request->tokens.size()) {
            save(i);
        }
    }
    const auto work = [&](int item) {
        auto& job = jobs[static_cast<std::size_t>(item)];
        auto& slot = slots_[job.slot];
        job.advance = slot.request->kind == RequestKind::score
                          ? score(*slot.request, vocabulary_, job.rows, job.cached_before + 1)
                          : generate(*slot.request, vocabulary_, job.rows, slot.draft,
                                     limits_.context_size - static_cast<int>(slot.cached.size() - slot.draft.size()));
    };
    if (static_cast<std::int64_t>(rows) * vocabulary_.size < kParallelLogits) {
        for (std::size_t item = 0; item < jobs.size(); item++) {
            work(static_cast<int>(item));
        }
    } else {
        pool_.run(static_cast<int>(jobs.size()), work);
    }
    for (const auto& job : jobs) {
        take_advance(job.slot, job.advance, job.cached_before);
    }
    stats_.sample_seconds += seconds_since(begin);
}

void Scheduler::take_advance(std::size_t index, const Advance& advance, std::size_t cached_before) {
    auto& slot = slots_[index];
    stats_.generated_tokens += static_cast<std::uint64_t>(advance.tokens);
    if (!slot.draft.empty()) {
        truncate(index, cached_before + static_cast<std::size_t>(slot.count + advance.accepted));
        decoder_.accepted(static_cast<int>(index), advance.accepted);
        stats_.draft_tokens += slot.draft.size();
        stats_.draft_tokens_accepted += static_cast<std::uint64_t>(advance.accepted);
    }
    if (advance.error) {
        end(index, "", advance.error);
    } else if (!advance.end.empty()) {
        end(index, advance.end);
    } else if (slot.request->kind == RequestKind::score && slot.cached.size() == wanted(*slot.request)) {
        end(index, "stop");
    }
}

void Scheduler::save(std::size_t index) {
    try {
        slots_[index].request->state = decoder_.save(static_cast<int>(index));
        end(index, "stop");
    } catch (const std::bad_alloc&) {  // a state may be gigabytes
        end(index, "", std::make_exception_ptr(DoesNotFitError("there is no memory for the saved state")));
    }
}

void Scheduler::take_embeddings(std::size_t index) {
    auto& slot = slots_[index];
    Request& request = *slot.request;
    const std::size_t before = slot.cached.size() - static_cast<std::size_t>(slot.count);
    for (int k = 0; k < slot.count; k++) {
        const float* row = decoder_.embedding(slot.first + k);
        if (row == nullptr) {
            end(index, "", std::make_exception_ptr(DecodeError("llama.cpp gave no embedding; the model may not offer them")));
            return;
        }
        embed(request, row, decoder_.embedding_size(), before + static_cast<std::size_t>(k));
    }
    if (slot.cached.size() == request.tokens.size()) {
        end(index, "stop");
    }
}

void Scheduler::end(std::size_t index, const std::string& reason, std::exception_ptr error) {
    auto& slot = slots_[index];
    ended_.push_back({std::move(slot.request), reason, std::move(error)});
    slot.request.reset();
    slot.draft.clear();
    paused_ = false;
    stats_.requests_finished++;
    stats_.requests_running--;
}

}  // namespace llama_moe
