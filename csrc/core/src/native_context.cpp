#include "native_context.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "backend.h"
#include "llama-ext.h"  // llama_get_memory_breakdown; this is the only file that includes it
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/expert_backend.h"
#include "llama_moe/log.h"
#include "machine.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

ggml_type parse_kv_type(const std::string& name) {
    static const ggml_type supported[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,  GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                          GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL};
    std::string names;
    for (const auto type : supported) {
        std::string known = ggml_type_name(type);
        std::transform(known.begin(), known.end(), known.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
        if (name == known) {
            return type;
        }
        names += (names.empty() ? "" : ", ") + known;
    }
    throw InvalidOptionError("kv_type is '" + name + "'; it must be one of " + names);
}

llama_flash_attn_type flash_attention(const std::string& name) {
    return name == "on"    ? LLAMA_FLASH_ATTN_TYPE_ENABLED
           : name == "off" ? LLAMA_FLASH_ATTN_TYPE_DISABLED
                           : LLAMA_FLASH_ATTN_TYPE_AUTO;
}

// Whether the file names a way of pooling, as those of embedding models do.
bool pools_by_itself(const LoadedModel& model) {
    char architecture[64];
    char value[16];
    if (llama_model_meta_val_str(model.model, "general.architecture", architecture, sizeof(architecture)) < 0) {
        return false;
    }
    return llama_model_meta_val_str(model.model, (std::string(architecture) + ".pooling_type").c_str(), value, sizeof(value)) > 0;
}

llama_context_params native_params(const LoadedModel& model, const ContextOptions& options, const NativeContextUse& use) {
    llama_context_params params = llama_context_default_params();
    const int trained = llama_model_n_ctx_train(model.model);
    const auto size = static_cast<std::uint64_t>(options.context_size > 0 ? options.context_size : trained);
    const std::uint64_t total = use.context_pool > 0 ? GGML_PAD(static_cast<std::uint64_t>(use.context_pool), 256)
                                                     : GGML_PAD(size, 256) * static_cast<std::uint64_t>(options.max_sequences);
    if (total > INT32_MAX) {
        throw InvalidOptionError("context_size " + std::to_string(size) + " times max_sequences " + std::to_string(options.max_sequences) +
                                 " is more than llama.cpp can index (2147483647)");
    }
    params.n_ctx = static_cast<std::uint32_t>(total);
    params.n_seq_max = static_cast<std::uint32_t>(options.max_sequences);
    params.n_batch = static_cast<std::uint32_t>(options.batch_size);
    params.n_ubatch = static_cast<std::uint32_t>(std::min(options.micro_batch_size, options.batch_size));
    params.n_outputs_max = static_cast<std::uint32_t>(use.max_outputs);
    params.kv_unified = use.context_pool > 0;
    // Pooling is ours: llama.cpp's would keep the embeddings of single tokens from us. (It warns when told what it would do anyway.)
    if (pools_by_itself(model)) {
        params.pooling_type = LLAMA_POOLING_TYPE_NONE;
    }
    params.n_threads = options.threads > 0 ? options.threads : usable_cores();
    params.n_threads_batch = options.threads_batch > 0 ? options.threads_batch : params.n_threads;
    params.type_k = params.type_v = parse_kv_type(options.kv_type);
    params.flash_attn_type = flash_attention(options.flash_attention);
    params.offload_kqv = options.offload_kv;
    params.no_perf = true;
    return params;
}

// Linux hands out more memory than there is and ends the process when the KV cache is first written: refuse before.
void check_kv_cache(const LoadedModel& model, const ContextOptions& options, const llama_context_params& params) {
    if (model.dry) {
        return;
    }
    const int layers = options.offload_kv ? model.host_layers : model.layers;
    const std::uint64_t elements = model.kv_elements_per_token * static_cast<std::uint64_t>(layers) * params.n_ctx;
    const std::uint64_t bytes = elements * ggml_type_size(params.type_k) / static_cast<std::uint64_t>(ggml_blck_size(params.type_k));
    if (bytes > available_ram()) {
        throw DoesNotFitError("a KV cache of " + std::to_string(params.n_ctx) + " tokens needs " + std::to_string(bytes) +
                              " bytes of host memory; " + std::to_string(available_ram()) +
                              " are available; use a smaller context_size, fewer sequences or a quantised kv_type");
    }
}

// How often llama.cpp counts the plain compute buffer of host memory in a dry run: once for each backend that shares it. Those are the CPU's,
// unless it computes in a GPU's pinned memory, and accelerators of the CPU such as our expert backend.
std::size_t sharers_of_host_buffer(const LoadedModel& model) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < ggml_backend_dev_count(); i++) {
        auto* device = ggml_backend_dev_get(i);
        const bool accelerates = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_ACCEL;
        count += accelerates && ggml_backend_dev_buffer_type(device) == ggml_backend_cpu_buffer_type() ? 1 : 0;
    }
    auto* first = model.devices.front();
    return first == nullptr || ggml_backend_dev_host_buffer_type(first) == nullptr ? count + 1 : std::max<std::size_t>(count, 1);
}

}  // namespace

void ContextOptions::validate() const {
    const auto at_least = [](const char* name, int value, int least, const char* zero = "") {
        if (value < least) {
            throw InvalidOptionError(std::string(name) + " is " + std::to_string(value) + "; it must be " + std::to_string(least) + zero + " or more");
        }
    };
    at_least("context_size", context_size, 0, " (the length the model was trained for)");
    at_least("max_sequences", max_sequences, 1);
    at_least("batch_size", batch_size, 1);
    at_least("micro_batch_size", micro_batch_size, 1);
    at_least("threads", threads, 0, " (one per core)");
    at_least("threads_batch", threads_batch, 0, " (as threads)");
    const auto most = static_cast<int>(llama_max_parallel_sequences());
    if (max_sequences > most) {
        throw InvalidOptionError("max_sequences is " + std::to_string(max_sequences) + "; llama.cpp holds at most " + std::to_string(most));
    }
    parse_kv_type(kv_type);
    if (flash_attention != "auto" && flash_attention != "on" && flash_attention != "off") {
        throw InvalidOptionError("flash_attention is '" + flash_attention + "'; it must be auto, on or off");
    }
}

NativeContext::NativeContext(std::shared_ptr<LoadedModel> model, const ContextOptions& options, const NativeContextUse& use,
                             std::function<bool()> should_abort)
    : model_(std::move(model)), worker_use_(model_->devices, WorkerUse::Kind::context), should_abort_(std::move(should_abort)) {
    options.validate();
    if (llama_model_has_encoder(model_->model)) {
        throw NoDecoderError("this is an encoder-decoder model; only decoder models can generate here");
    }
    auto params = native_params(*model_, options, use);
    check_kv_cache(*model_, options, params);
    if (!model_->dry) {
        threads_ = std::make_unique<CpuThreads>(std::max(params.n_threads, params.n_threads_batch));
    }
    params.abort_callback_data = this;
    params.abort_callback = [](void* data) { return static_cast<NativeContext*>(data)->should_abort_(); };
    ErrorLog errors;
    std::string reason;
    try {
        context_ = llama_init_from_model(model_->model, params);
    } catch (const NativeAbort& abort) {
        reason = abort.what();
    }
    if (context_ != nullptr && !model_->loras.adapters.empty()) {
        reason = add_loras();
    }
    if (context_ == nullptr) {
        reason = reason.empty() ? errors.text("llama.cpp gave no reason") : reason;
        const std::string what = "a context of " + std::to_string(params.n_ctx) + " tokens could not be made: " + reason;
        if (reason.find("allocate") != std::string::npos) {
            throw DoesNotFitError(what + "; use a smaller context_size, fewer sequences or a quantised kv_type");
        }
        throw InvalidOptionError(what);
    }
    if (llama_get_memory(context_) == nullptr) {
        llama_free(context_);
        throw NoDecoderError("this model keeps no KV cache, as embedding models that read a text as a whole do; only decoder models can be used here");
    }
    limits_.context_size = static_cast<int>(llama_n_ctx_seq(context_));
    if (use.context_pool > 0 && options.context_size > 0) {
        limits_.context_size = std::min(limits_.context_size, options.context_size);
    }
    limits_.max_sequences = static_cast<int>(llama_n_seq_max(context_));
    limits_.batch_size = static_cast<int>(llama_n_batch(context_));
    limits_.micro_batch_size = static_cast<int>(llama_n_ubatch(context_));
    limits_.threads = llama_n_threads(context_);
    limits_.threads_batch = llama_n_threads_batch(context_);
    if (threads_) {
        llama_attach_threadpool(context_, threads_->pool(), nullptr);
    }
    if (use.routing) {
        routing_ = std::make_unique<RoutingReader>(context_, use.routing, params.kv_unified || limits_.max_sequences == 1);
    }
}

// The reason why it could not be done, after which there is no context; "" if there is none.
std::string NativeContext::add_loras() {
    try {
        use_loras(context_, model_->loras);
        return "";
    } catch (const NativeAbort& abort) {
        abandon();
        return abort.what();
    } catch (const std::exception& error) {
        llama_free(context_);
        context_ = nullptr;
        return error.what();
    }
}

NativeContext::~NativeContext() {
    if (context_ != nullptr) {
        llama_free(context_);
    }
}

int NativeContext::decode(const Batch& batch) {
    const CpuThreads::Use threads(*threads_);
    if (!routing_ || !routing_->begin()) {
        return llama_decode(context_, batch.get());
    }
    const experts::Observer observer([this](const ggml_tensor* op) { routing_->see(op); });
    const int status = llama_decode(context_, batch.get());
    routing_->end(batch.rows(), status == 0);
    return status;
}

void NativeContext::abandon() {
    context_ = nullptr;
    // The context still points to its threads and into the model, so these must stay as well: this reference is never given back.
    static_cast<void>(threads_.release());
    new std::shared_ptr<LoadedModel>(model_);
}

void NativeContext::truncate(int sequence, int start) {
    if (!llama_memory_seq_rm(memory(), sequence, start, -1)) {
        llama_memory_seq_rm(memory(), sequence, -1, -1);
    }
}

std::vector<BreakdownRow> NativeContext::breakdown() const {
    std::vector<BreakdownRow> rows;
    for (const auto& [type, data] : llama_get_memory_breakdown(context_)) {
        const bool shared = model_->dry && type == ggml_backend_cpu_buffer_type();
        const std::size_t compute = shared ? data.compute / sharers_of_host_buffer(*model_) : data.compute;
        const std::pair<const char*, std::size_t> kinds[] = {{"model", data.model}, {"context", data.context}, {"compute", compute}};
        for (const auto& [kind, bytes] : kinds) {
            if (bytes > 0) {
                rows.push_back({ggml_backend_buft_name(type), buffer_device(type), is_host_buffer(type), kind, bytes});
            }
        }
    }
    return rows;
}

std::vector<MemoryRow> NativeContext::memory_rows() const {
    std::map<std::string, std::uint64_t> experts;
    std::map<std::pair<std::string, std::string>, std::uint64_t> sums;
    for (const auto& row : model_->memory) {
        sums[{row.device, row.role}] += row.bytes;
        if (row.role == "experts") {
            experts[row.device] += row.bytes;
        }
    }
    std::map<std::string, std::uint64_t> weights;
    for (const auto& row : breakdown()) {
        if (row.kind == "model") {
            weights[row.device] += row.bytes;
        } else {
            sums[{row.device, row.kind == "context" ? "kv_cache" : "compute"}] += row.bytes;
        }
    }
    for (const auto& [device, bytes] : weights) {
        // llama.cpp counts a mapped file in full, also what went elsewhere: there our count of tensors stands. Everywhere
        // else its account is exact, and what is not experts is the other weights.
        const bool mapping = device == "CPU" && model_->mapped;
        if (!mapping && bytes >= experts[device]) {
            sums[{device, "weights"}] = bytes - experts[device];
        }
    }
    std::vector<MemoryRow> rows;
    for (const auto& [key, bytes] : sums) {
        if (bytes > 0) {
            rows.push_back({key.first, key.second, bytes});
        }
    }
    return rows;
}

Batch::Batch(int capacity) {
    const auto size = static_cast<std::size_t>(capacity);
    tokens_.resize(size);
    positions_.resize(size);
    counts_.assign(size, 1);
    sequences_.resize(size);
    outputs_.resize(size);
    requests_.resize(size);
    for (auto& sequence : sequences_) {
        sequence_pointers_.push_back(&sequence);
    }
    batch_.token = tokens_.data();
    batch_.pos = positions_.data();
    batch_.n_seq_id = counts_.data();
    batch_.seq_id = sequence_pointers_.data();
    batch_.logits = outputs_.data();
}

void Batch::add(std::int32_t token, int position, int sequence, bool output, std::int64_t request) {
    const auto i = static_cast<std::size_t>(batch_.n_tokens++);
    tokens_[i] = token;
    positions_[i] = position;
    sequences_[i] = sequence;
    outputs_[i] = output ? 1 : 0;
    requests_[i] = request;
}

std::vector<BatchRow> Batch::rows() const {
    std::vector<BatchRow> rows;
    for (std::size_t i = 0; i < static_cast<std::size_t>(batch_.n_tokens); i++) {
        rows.push_back({{tokens_[i], positions_[i], sequences_[i], requests_[i]}, outputs_[i] != 0});
    }
    return rows;
}

void Batch::add_output_to_wait_for() {
    const auto end = outputs_.begin() + batch_.n_tokens;
    if (batch_.n_tokens > 0 && std::find(outputs_.begin(), end, 1) == end) {
        outputs_[static_cast<std::size_t>(batch_.n_tokens - 1)] = 1;
    }
}

}  // namespace llama_moe
