#include "llama_moe/imatrix.h"

#include <algorithm>
#include <atomic>

#include "eval_callback.h"
#include "imatrix_collector.h"
#include "llama.h"
#include "llama_moe/context.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "native_context.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

constexpr int kLeastChunk = 32;

// What the thread that waits and the one that computes have in common; lives until both are done.
struct Work {
    explicit Work(bool output) : collector(output) {}

    ImatrixCollector collector;
    std::atomic<bool> cancelled{false};
    std::atomic<int> chunks_done{0};
    int chunks = 0;
    int layers = 1;

    float share_done() const {
        const auto within = static_cast<float>(std::min(collector.layer(), layers)) / static_cast<float>(layers);
        const auto done = static_cast<float>(chunks_done.load(std::memory_order_acquire));
        return std::min(1.0f, (done + (chunks_done.load() < chunks ? within : 0.0f)) / static_cast<float>(chunks));
    }
};

void compute_chunk(NativeContext& context, Batch& batch, const std::int32_t* tokens, int count, const Work& work) {
    llama_memory_clear(context.memory(), true);
    batch.clear();
    const llama_vocab* vocab = context.model().vocab;
    for (int i = 0; i < count; i++) {
        // Each chunk begins as a text does. All logits are wanted, because a last layer skips the experts of a token whose are not.
        const bool begins = i == 0 && llama_vocab_get_add_bos(vocab);
        batch.add(begins ? llama_vocab_bos(vocab) : tokens[i], i, /*sequence=*/0, /*output=*/true);
    }
    ErrorLog errors;
    const ExpectedFailure quiet([&work] { return work.cancelled.load() || !work.collector.error().empty(); });
    const int status = context.decode(batch);
    llama_synchronize(context.get());
    if (work.cancelled.load()) {
        throw CancelledError("computing the importance matrix was cancelled");
    }
    if (!work.collector.error().empty()) {
        throw QuantizeError("no importance matrix: " + work.collector.error());
    }
    if (status != 0) {
        throw DecodeError("llama.cpp could not decode " + std::to_string(count) + " tokens (status " + std::to_string(status) +
                          "): " + errors.text("no reason was given"));
    }
}

void compute_chunks(const std::shared_ptr<LoadedModel>& model, const std::vector<std::int32_t>& tokens, const ImatrixOptions& options, Work& work) {
    ContextOptions context_options;
    context_options.context_size = context_options.batch_size = context_options.micro_batch_size = options.chunk_size;
    context_options.threads = options.threads;
    NativeContext context(model, context_options, NativeContextUse{}, [&work] { return work.cancelled.load(); });
    const auto on_node = [](ggml_tensor* node, bool ask, void* data) {
        auto& running = *static_cast<Work*>(data);
        return running.cancelled.load() ? false : running.collector.on_node(node, ask);
    };
    set_eval_callback(context.get(), on_node, &work);
    Batch batch(options.chunk_size);
    try {
        for (int chunk = 0; chunk < work.chunks; chunk++) {
            compute_chunk(context, batch, tokens.data() + static_cast<std::ptrdiff_t>(chunk) * options.chunk_size, options.chunk_size, work);
            work.chunks_done.store(chunk + 1, std::memory_order_release);
        }
    } catch (const NativeAbort& abort) {
        context.abandon();
        throw DecodeError(std::string("llama.cpp failed: ") + abort.what());
    }
}

void warn_of_unused_experts(const Imatrix& imatrix) {
    std::size_t unused = 0;
    std::size_t all = 0;
    for (const auto& [name, entry] : imatrix.entries) {
        if (entry.counts.size() > 1) {
            unused += static_cast<std::size_t>(std::count(entry.counts.begin(), entry.counts.end(), 0.0f));
            all += entry.counts.size();
        }
    }
    if (unused > 0) {
        log_line(LogLevel::warning, "no token of the text used " + std::to_string(unused) + " of the " + std::to_string(all) +
                                        " experts' matrices; they will be quantised as if all their inputs were alike. A longer or more varied text helps");
    }
}

}  // namespace

void ImatrixOptions::validate() const {
    const auto at_least = [](const char* name, int value, int least) {
        if (value < least) {
            throw InvalidOptionError(std::string(name) + " is " + std::to_string(value) + "; it must be " + std::to_string(least) + " or more");
        }
    };
    at_least("context_size", chunk_size, kLeastChunk);
    at_least("chunks", chunks, 0);
    at_least("threads", threads, 0);
}

std::shared_ptr<Imatrix> collect_imatrix(const std::shared_ptr<Model>& model, const std::vector<std::int32_t>& tokens, const ImatrixOptions& options,
                                         const std::function<void(float)>& on_progress, const Poll& poll) {
    options.validate();
    const auto loaded = model->acquire();
    const std::size_t available = tokens.size() / static_cast<std::size_t>(options.chunk_size);
    if (available == 0) {
        throw InvalidOptionError("the text has " + std::to_string(tokens.size()) + " tokens; one chunk of context_size " +
                                 std::to_string(options.chunk_size) + " is the least");
    }
    auto work = std::make_shared<Work>(options.output);
    work->chunks = static_cast<int>(std::min<std::size_t>(available, options.chunks > 0 ? static_cast<std::size_t>(options.chunks) : INT32_MAX));
    work->layers = std::max(1, loaded->layers);
    float reported = -1.0f;
    const auto report = [&] {
        const float share = work->share_done();
        if (on_progress && share > reported) {
            reported = share;
            on_progress(share);
        }
        if (poll) {
            poll();
        }
    };
    run_native([work, loaded, tokens, options] { compute_chunks(loaded, tokens, options, *work); }, report,
               [work] { work->cancelled.store(true); }, loaded->devices);
    if (on_progress && reported < 1.0f) {
        on_progress(1.0f);
    }
    auto imatrix = std::make_shared<Imatrix>();
    imatrix->entries = work->collector.entries();
    imatrix->datasets = {options.dataset};
    imatrix->chunk_count = static_cast<std::uint32_t>(work->chunks);
    imatrix->chunk_size = static_cast<std::uint32_t>(options.chunk_size);
    warn_of_unused_experts(*imatrix);
    return imatrix;
}

}  // namespace llama_moe
