#include "native_decoder.h"

#include <algorithm>

#include "llama_moe/error.h"
#include "llama_moe/log.h"

namespace llama_moe {
namespace {

// Rows that scores and embeddings may take of a batch, beside those of generation: more compute quicker, and enlarge the compute
// buffer, which has a row of logits for each.
int score_rows(const LoadedModel& model) {
    constexpr int kLogits = 1 << 20;
    return std::clamp(kLogits / llama_vocab_n_tokens(model.vocab), 32, 256);
}

}  // namespace

NativeContextUse engine_use(const LoadedModel& model, const EngineOptions& options, std::shared_ptr<RoutingHub> routing) {
    return {std::min(options.batch_size, options.max_sequences * (1 + options.draft_tokens) + score_rows(model)), options.context_pool,
            std::move(routing)};
}

NativeDecoder::NativeDecoder(std::shared_ptr<LoadedModel> model, std::shared_ptr<LoadedModel> draft_model, const EngineOptions& options,
                             std::shared_ptr<RoutingHub> routing, const std::function<bool()>& should_abort)
    : should_abort_(should_abort),
      max_draft_(options.draft_tokens),
      max_outputs_(engine_use(*model, options).max_outputs),
      can_truncate_(takes_back_tokens(*model)),
      shares_cells_(options.context_pool > 0),
      context_(model, options, engine_use(*model, options, std::move(routing)), should_abort),
      batch_(context_.limits().batch_size) {
    if (options.draft_tokens > 0) {
        if (!can_truncate_) {
            throw InvalidOptionError("speculative decoding needs a model that can take back tokens; this one keeps a recurrent state");
        }
        speculation_ = std::make_unique<Speculation>(context_, std::move(draft_model), options, should_abort);
    }
}

int NativeDecoder::embedding_size() const {
    return llama_model_n_embd_out(context_.model().model);
}

DecodeStatus NativeDecoder::decode(const std::vector<BatchToken>& batch, bool embeddings) {
    if (embeddings != computes_embeddings_) {
        llama_set_embeddings(context_.get(), embeddings);
        computes_embeddings_ = embeddings;
    }
    batch_.clear();
    for (const auto& token : batch) {
        batch_.add(token.token, token.position, token.sequence, token.output, token.request);
    }
    batch_.add_output_to_wait_for();
    const ExpectedFailure quiet(should_abort_);
    const int status = context_.decode(batch_);
    if (status != 0) {
        return status == 1 ? DecodeStatus::full : status == 2 ? DecodeStatus::aborted : DecodeStatus::failed;
    }
    llama_synchronize(context_.get());
    if (speculation_ && !speculation_->process(batch)) {
        return should_abort_() ? DecodeStatus::aborted : DecodeStatus::failed;
    }
    return DecodeStatus::done;
}

bool NativeDecoder::truncate(int sequence, int length) {
    if (speculation_) {
        speculation_->truncate(sequence, length);
    }
    if (length > 0 && llama_memory_seq_rm(context_.memory(), sequence, length, -1) && holds(sequence, length)) {
        return true;
    }
    llama_memory_seq_rm(context_.memory(), sequence, -1, -1);
    if (speculation_) {
        speculation_->truncate(sequence, 0);
    }
    return length == 0;
}

// Whether a sequence has all that its next token looks at. With a sliding window, llama.cpp drops what is behind it: from saved
// states always, and from a shared pool when it needs the room. After a cut the window reaches further back.
bool NativeDecoder::holds(int sequence, int length) const {
    const int window = llama_model_n_swa(context_.model().model);
    const int first = llama_memory_seq_pos_min(context_.memory(), sequence);
    return llama_memory_seq_pos_max(context_.memory(), sequence) == length - 1 && (window == 0 || first <= std::max(0, length - window));
}

void NativeDecoder::copy(int source, int destination) {
    llama_memory_seq_rm(context_.memory(), destination, -1, -1);
    llama_memory_seq_cp(context_.memory(), source, destination, -1, -1);
    if (speculation_) {
        speculation_->copy(source, destination);
    }
}

void NativeDecoder::draft(std::vector<Draft>& drafts) {
    if (speculation_) {
        speculation_->draft(drafts);
    }
}

void NativeDecoder::accepted(int sequence, int count) {
    if (speculation_) {
        speculation_->accepted(sequence, count);
    }
}

std::string NativeDecoder::save(int sequence) {
    std::string state(llama_state_seq_get_size(context_.get(), sequence), '\0');
    state.resize(llama_state_seq_get_data(context_.get(), reinterpret_cast<std::uint8_t*>(state.data()), state.size(), sequence));
    return state;
}

bool NativeDecoder::restore(int sequence, const std::vector<std::int32_t>& tokens, const std::string& state) {
    truncate(sequence, 0);
    if (llama_state_seq_set_data(context_.get(), reinterpret_cast<const std::uint8_t*>(state.data()), state.size(), sequence) == 0 ||
        !holds(sequence, static_cast<int>(tokens.size())) || (speculation_ && !speculation_->compute(sequence, tokens))) {
        truncate(sequence, 0);
        return false;
    }
    return true;
}

std::vector<MemoryRow> NativeDecoder::memory_rows() const {
    auto rows = context_.memory_rows();
    if (speculation_) {
        speculation_->add_memory(rows);
    }
    return rows;
}

std::vector<BreakdownRow> NativeDecoder::breakdown() const {
    return context_.breakdown();
}

void NativeDecoder::abandon() {
    context_.abandon();
    if (speculation_) {
        // Its context may share devices with the one that was lost: left behind too.
        speculation_->abandon();
        static_cast<void>(speculation_.release());
    }
}

}  // namespace llama_moe
