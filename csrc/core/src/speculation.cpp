#include "speculation.h"

#include <algorithm>

#include "llama_moe/error.h"
#include "loaded_model.h"
#include "native_thread.h"
#include "speculative.h"

namespace llama_moe {
namespace {

common_params_speculative speculative_params(const EngineOptions& options, llama_context* target, llama_context* draft) {
    common_params_speculative params;
    if (draft != nullptr) {
        params.types = {COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE};
        params.draft.n_max = options.draft_tokens;
        params.draft.p_min = options.draft_min_probability;
        params.draft.ctx_tgt = target;
        params.draft.ctx_dft = draft;
    } else {
        params.types = {COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE};
        params.ngram_simple.size_n = static_cast<std::uint16_t>(options.draft_ngram);
        params.ngram_simple.size_m = static_cast<std::uint16_t>(options.draft_tokens);
    }
    return params;
}

// The draft model runs beside the target, with as many sequences of the same length.
std::unique_ptr<NativeContext> draft_context(std::shared_ptr<LoadedModel> model, const EngineOptions& options, const ContextLimits& target,
                                             std::function<bool()> should_abort) {
    if (!model) {
        return nullptr;
    }
    ContextOptions draft = options;
    draft.context_size = target.context_size;
    return std::make_unique<NativeContext>(std::move(model), draft, NativeContextUse{options.max_sequences, options.context_pool},
                                           std::move(should_abort));
}

}  // namespace

struct Speculation::State {
    std::unique_ptr<NativeContext> context;  // of the draft model; none for lookup
    common_batch batch;
    int batch_size = 0;
    common_speculative_ptr drafter;
};

Speculation::Speculation(NativeContext& target, std::shared_ptr<LoadedModel> draft_model, const EngineOptions& options,
                         std::function<bool()> should_abort)
    : state_(std::make_unique<State>()) {
    if (draft_model && !takes_back_tokens(*draft_model)) {
        throw InvalidOptionError("the draft model keeps a recurrent state; it must be one that can take back tokens");
    }
    state_->context = draft_context(std::move(draft_model), options, target.limits(), std::move(should_abort));
    state_->batch_size = target.limits().batch_size;
    llama_context* draft = state_->context ? state_->context->get() : nullptr;
    if (draft != nullptr) {
        state_->batch = common_batch(draft);
    }
    auto params = speculative_params(options, target.get(), draft);
    try {
        state_->drafter.reset(common_speculative_init(params, static_cast<std::uint32_t>(options.max_sequences)));
    } catch (const NativeAbort&) {
        throw;
    } catch (const std::exception& error) {
        throw InvalidOptionError(std::string("this draft model cannot draft for this model: ") + error.what());
    }
}

Speculation::~Speculation() = default;

bool Speculation::process(const std::vector<BatchToken>& batch) {
    if (!state_->context) {
        return true;
    }
    state_->batch.clear();
    for (const auto& token : batch) {
        state_->batch.add(token.token, token.position, token.sequence, false);
    }
    return common_speculative_process(state_->drafter.get(), state_->batch);
}

bool Speculation::compute(int sequence, const std::vector<std::int32_t>& tokens) {
    const auto size = static_cast<std::size_t>(state_->batch_size);
    for (std::size_t begin = 0; begin < tokens.size(); begin += size) {
        std::vector<BatchToken> batch;
        for (std::size_t i = begin; i < std::min(begin + size, tokens.size()); i++) {
            batch.push_back({tokens[i], static_cast<int>(i), sequence, false});
        }
        if (!process(batch)) {
            return false;
        }
    }
    return true;
}

void Speculation::draft(std::vector<Draft>& drafts) {
    for (const auto& draft : drafts) {
        common_speculative_get_draft_params(state_->drafter.get(), draft.sequence) = {
            /*drafting=*/true,
            /*n_max=*/draft.most,
            /*pos0=*/static_cast<llama_pos>(draft.cached->size()),
            /*id_last=*/draft.last,
            /*prompt=*/draft.cached,
            /*result=*/draft.tokens,
        };
    }
    common_speculative_draft(state_->drafter.get());
    for (const auto& draft : drafts) {
        // What was drafted is computed again with the target's batch.
        truncate(draft.sequence, static_cast<int>(draft.cached->size()));
        if (static_cast<int>(draft.tokens->size()) > draft.most) {
            draft.tokens->resize(static_cast<std::size_t>(draft.most));
        }
    }
}

void Speculation::accepted(int sequence, int count) {
    common_speculative_accept(state_->drafter.get(), sequence, static_cast<std::uint16_t>(count));
}

void Speculation::truncate(int sequence, int length) {
    if (state_->context) {
        state_->context->truncate(sequence, length);
    }
}

void Speculation::copy(int source, int destination) {
    if (state_->context) {
        llama_memory_seq_rm(state_->context->memory(), destination, -1, -1);
        llama_memory_seq_cp(state_->context->memory(), source, destination, -1, -1);
    }
}

void Speculation::add_memory(std::vector<MemoryRow>& rows) const {
    if (!state_->context) {
        return;
    }
    for (const auto& row : state_->context->memory_rows()) {
        add_bytes(rows, row.device, row.role, row.bytes);
    }
}

void Speculation::abandon() {
    if (state_->context) {
        state_->context->abandon();
    }
}

}  // namespace llama_moe
