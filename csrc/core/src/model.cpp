#include "llama_moe/model.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "backend.h"
#include "ggml.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "llama_moe/process.h"
#include "loaded_model.h"
#include "machine.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

std::uint64_t host_bytes(const ResolvedPlacement& placement) {
    std::uint64_t bytes = 0;
    for (const auto& tensor : placement.tensors) {
        bytes += tensor.device == "CPU" ? tensor.bytes : 0;
    }
    return bytes;
}

// Refuses what would otherwise be a warning, a slower mode than was asked for, or the kernel killing the process.
void check_host_memory(const ModelOptions& options, const ResolvedPlacement& placement, const std::vector<ggml_backend_dev_t>& devices) {
    const std::uint64_t needed = host_bytes(placement);
    if (options.host_memory != "mmap" && needed > available_ram()) {
        throw DoesNotFitError("host_memory='" + options.host_memory + "' needs " + std::to_string(needed) + " bytes of host memory for weights; " +
                              std::to_string(available_ram()) + " are available; use host_memory='mmap'");
    }
    const bool has_pinned = std::any_of(devices.begin(), devices.end(), [](auto* d) { return ggml_backend_dev_host_buffer_type(d) != nullptr; });
    if (options.host_memory == "pinned" && !has_pinned) {
        throw InvalidOptionError("host_memory='pinned' needs an accelerator that offers pinned host memory; use 'mmap' or 'pageable'");
    }
    rlimit limit{};
    if (options.host_memory == "locked" && geteuid() != 0 && getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur < needed) {
        throw DoesNotFitError("host_memory='locked' needs " + std::to_string(needed) + " bytes; the limit on locked memory (ulimit -l) is " +
                              std::to_string(limit.rlim_cur));
    }
}

llama_model_params native_params(LoadedModel& loaded, const ModelOptions& options, const ResolvedPlacement& placement) {
    for (const auto& name : placement.accelerators) {
        loaded.devices.push_back(find_device(name));
    }
    loaded.devices.push_back(nullptr);
    for (const auto& rule : placement.overrides) {
        loaded.patterns.push_back(rule.pattern);
        // Not the device's own pointer for the CPU: llama.cpp compares with this one to consider repacked buffers.
        auto* type = rule.device == "CPU" ? ggml_backend_cpu_buffer_type() : ggml_backend_dev_buffer_type(find_device(rule.device));
        loaded.overrides.push_back({loaded.patterns.back().c_str(), type});
    }
    loaded.overrides.push_back({nullptr, nullptr});
    loaded.tensor_split = placement.tensor_split;
    loaded.tensor_split.resize(llama_max_devices(), 0.0f);

    llama_model_params params = llama_model_default_params();
    params.devices = loaded.devices.data();
    params.tensor_buft_overrides = loaded.overrides.data();
    params.n_gpu_layers = options.gpu_layers;
    params.split_mode = LLAMA_SPLIT_MODE_LAYER;
    params.tensor_split = loaded.tensor_split.data();
    params.use_extra_bufts = options.repack;
    params.check_tensors = options.check_tensors;
    params.no_host = options.host_memory == "pageable";
    loaded.mapped = options.host_memory == "mmap" || options.host_memory == "locked";
    params.load_mode = options.host_memory == "mmap"     ? LLAMA_LOAD_MODE_MMAP
                       : options.host_memory == "locked" ? LLAMA_LOAD_MODE_MMAP_MLOCK
                                                         : LLAMA_LOAD_MODE_NONE;
    return params;
}

// Bytes of a tensor in a device's buffer: llama.cpp pads each one.
std::uint64_t allocated_bytes(const TensorInfo& tensor, ggml_backend_buffer_type_t type) {
    const ggml_init_params params{ggml_tensor_overhead(), nullptr, /*no_alloc=*/true};
    ggml_context* context = ggml_init(params);
    const ggml_tensor* meta =
        ggml_new_tensor(context, static_cast<ggml_type>(tensor.type_id), static_cast<int>(tensor.shape.size()), tensor.shape.data());
    const std::size_t bytes = ggml_backend_buft_get_alloc_size(type, meta);
    ggml_free(context);
    return GGML_PAD(bytes, ggml_backend_buft_get_alignment(type));
}

std::vector<MemoryRow> count_memory(const GgufInfo& gguf, const std::vector<TensorPlacement>& placement) {
    std::map<std::string, const TensorInfo*> by_name;
    for (const auto& tensor : gguf.tensors) {
        by_name[tensor.name] = &tensor;
    }
    std::map<std::pair<std::string, std::string>, std::uint64_t> sums;
    for (const auto& tensor : placement) {
        ggml_backend_dev_t device = find_device(tensor.device);
        const std::string role = tensor.role == TensorRole::experts ? "experts" : "weights";
        sums[{tensor.device, role}] += allocated_bytes(*by_name.at(tensor.name), ggml_backend_dev_buffer_type(device));
    }
    std::vector<MemoryRow> rows;
    for (const auto& [key, bytes] : sums) {
        rows.push_back({key.first, key.second, bytes});
    }
    return rows;
}

std::uint64_t fingerprint(const GgufInfo& gguf) {
    std::uint64_t hash = 1469598103934665603ull;  // FNV-1a, 64 bits
    const auto add = [&hash](const std::string& text) {
        for (const char c : text) {
            hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ull;
        }
    };
    add(gguf.architecture);
    for (const auto& tensor : gguf.tensors) {
        add(tensor.name + tensor.type);
        for (const auto extent : tensor.shape) {
            add(std::to_string(extent) + ",");
        }
    }
    for (const auto& [key, value] : gguf.metadata) {
        if (const auto* number = std::get_if<std::uint64_t>(&value)) {
            add(key + std::to_string(*number));
        } else if (const auto* text = std::get_if<std::string>(&value)) {
            add(key + *text);
        }
    }
    return hash;
}

struct LoadControl {
    std::atomic<float> progress{0.0f};
    std::atomic<bool> cancelled{false};
};

// llama.cpp's word for "does not fit" is a failed allocation in the log.
[[noreturn]] void throw_load_error(const std::string& path, const std::string& reason) {
    if (reason.find("unable to allocate") != std::string::npos || reason.find("failed to allocate") != std::string::npos ||
        reason.find("out of memory") != std::string::npos) {
        throw DoesNotFitError("out of memory while loading '" + path + "': " + reason);
    }
    throw ModelLoadError("cannot load '" + path + "': " + reason);
}

void load_native(LoadedModel& loaded, const GgufInfo& gguf, llama_model_params params, LoadControl& control) {
    params.progress_callback_user_data = &control;
    params.progress_callback = [](float progress, void* data) {
        auto* state = static_cast<LoadControl*>(data);
        state->progress.store(progress, std::memory_order_relaxed);
        return !state->cancelled.load(std::memory_order_relaxed);
    };
    ErrorLog errors;
    try {
        std::vector<const char*> files;
        for (const auto& file : gguf.files) {
            files.push_back(file.c_str());
        }
        loaded.model = files.size() > 1 ? llama_model_load_from_splits(files.data(), files.size(), params)
                                        : llama_model_load_from_file(files.front(), params);
    } catch (const NativeAbort& abort) {
        throw_load_error(gguf.path, abort.what());
    }
    if (control.cancelled.load()) {
        throw CancelledError("loading '" + gguf.path + "' was cancelled");
    }
    if (loaded.model == nullptr) {
        throw_load_error(gguf.path, errors.text("llama.cpp gave no reason"));
    }
    loaded.vocab = llama_model_get_vocab(loaded.model);
    loaded.fingerprint = fingerprint(gguf);
    loaded.layers = gguf.layer_count;
    const bool standard_attention = takes_back_tokens(loaded) && llama_model_n_swa(loaded.model) == 0 &&
                                    gguf.architecture_integer("attention.kv_lora_rank", 0) == 0;
    loaded.kv_elements_per_token = standard_attention ? kv_elements_per_token(gguf) : 0;
}

std::string describe(const llama_model* model) {
    char text[256];
    const int size = llama_model_desc(model, text, sizeof(text));
    return size > 0 ? std::string(text) : "";
}

}  // namespace

LoadedModel::~LoadedModel() {
    if (model == nullptr) {
        return;
    }
    // On a thread that can be given up: freeing memory on a worker that died or hangs never returns.
    try {
        run_native([native = model] { llama_model_free(native); }, within_close_limit(devices), {}, devices);
    } catch (const std::exception& error) {
        log_line(LogLevel::error, std::string("a model could not be freed: ") + error.what());
    }
}

std::shared_ptr<Model> Model::load(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy,
                                   const Progress& on_progress, const Poll& poll) {
    start_backend();
    struct Result {
        std::shared_ptr<Model> model;
        LoadControl control;
    };
    auto result = std::make_shared<Result>();
    result->model.reset(new Model);
    if (on_progress) {
        on_progress(0.0f);
    }
    float reported = 0.0f;
    const auto report = [&] {
        const float progress = result->control.progress.load(std::memory_order_relaxed);
        if (on_progress && progress > reported && progress < 1.0f) {
            reported = progress;
            on_progress(progress);
        }
        if (poll) {
            poll();
        }
    };
    run_native(
        [result, path, options, policy] {
            Model& model = *result->model;
            model.path_ = path;
            model.gguf_ = read_gguf(path);
            auto placement = resolve_placement(model.gguf_, options, policy);
            auto loaded = std::make_shared<LoadedModel>();
            const auto params = native_params(*loaded, options, placement);
            check_host_memory(options, placement, {loaded->devices.begin(), loaded->devices.end() - 1});
            if (!placement.summary.empty()) {
                log_line(LogLevel::info, placement.summary);
            }
            loaded->host_layers = placement.host_layers;
            load_native(*loaded, model.gguf_, params, result->control);
            loaded->memory = count_memory(model.gguf_, placement.tensors);
            model.placement_ = std::move(placement.tensors);
            model.description_ = describe(loaded->model);
            model.vocab_size_ = llama_vocab_n_tokens(loaded->vocab);
            model.context_length_ = llama_model_n_ctx_train(loaded->model);
            model.embedding_length_ = llama_model_n_embd(loaded->model);
            model.bos_token_ = llama_vocab_bos(loaded->vocab);
            model.eos_token_ = llama_vocab_eos(loaded->vocab);
            if (const char* text = llama_model_chat_template(loaded->model, nullptr)) {
                model.chat_template_ = text;
            }
            model.loaded_ = std::move(loaded);
        },
        report, [result] { result->control.cancelled.store(true); }, chosen_accelerators(options));
    if (on_progress) {
        on_progress(1.0f);
    }
    return std::shared_ptr<Model>(result, result->model.get());
}

Model::Model() {
    live_objects().models++;
}

Model::~Model() {
    close();
    live_objects().models--;
}

std::shared_ptr<LoadedModel> Model::acquire() const {
    require_same_process("the model");
    std::lock_guard<std::mutex> lock(mutex_);
    if (!loaded_) {
        throw ClosedError("the model '" + path_ + "' is closed");
    }
    return loaded_;
}

void Model::add_user(const std::shared_ptr<ModelUser>& user) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!loaded_) {  // closed while the user was being made: nobody would close it
        throw ClosedError("the model '" + path_ + "' is closed");
    }
    users_.erase(std::remove_if(users_.begin(), users_.end(), [](const auto& weak) { return weak.expired(); }), users_.end());
    users_.push_back(user);
}

void Model::close() {
    if (forked()) {
        return;
    }
    std::shared_ptr<LoadedModel> loaded;
    std::vector<std::weak_ptr<ModelUser>> users;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        loaded.swap(loaded_);
        users.swap(users_);
    }
    for (const auto& weak : users) {
        if (const auto user = weak.lock()) {
            user->close();
        }
    }
}

bool Model::closed() const {
    if (forked()) {
        return true;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    return loaded_ == nullptr;
}

std::vector<MemoryRow> Model::memory() const {
    return acquire()->memory;
}

std::vector<std::int32_t> Model::tokenize(const std::string& text, bool add_special, bool parse_special) const {
    const auto loaded = acquire();
    const NativeScope scope;
    if (text.size() > INT32_MAX / 2) {
        throw InvalidOptionError("the text has " + std::to_string(text.size()) + " bytes; at most 1 GiB can be tokenized at once");
    }
    const auto size = static_cast<std::int32_t>(text.size());
    std::vector<std::int32_t> tokens(text.size() + 8);
    auto count = llama_tokenize(loaded->vocab, text.data(), size, tokens.data(), static_cast<std::int32_t>(tokens.size()), add_special, parse_special);
    if (count < 0) {
        tokens.resize(static_cast<std::size_t>(-count));
        count = llama_tokenize(loaded->vocab, text.data(), size, tokens.data(), -count, add_special, parse_special);
    }
    tokens.resize(static_cast<std::size_t>(std::max(count, 0)));
    return tokens;
}

std::string Model::detokenize(const std::vector<std::int32_t>& tokens, bool special) const {
    const auto loaded = acquire();
    const NativeScope scope;
    for (const auto token : tokens) {
        if (token < 0 || token >= vocab_size_) {
            throw InvalidOptionError("token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(vocab_size_));
        }
    }
    const auto count = static_cast<std::int32_t>(tokens.size());
    std::string text(tokens.size() * 8 + 16, '\0');
    auto size = llama_detokenize(loaded->vocab, tokens.data(), count, text.data(), static_cast<std::int32_t>(text.size()), false, special);
    if (size < 0) {
        text.resize(static_cast<std::size_t>(-size));
        size = llama_detokenize(loaded->vocab, tokens.data(), count, text.data(), -size, false, special);
    }
    text.resize(static_cast<std::size_t>(std::max(size, 0)));
    return text;
}

std::string Model::token_bytes(std::int32_t token, bool special) const {
    if (token < 0 || token >= vocab_size_) {
        throw InvalidOptionError("token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(vocab_size_));
    }
    const auto loaded = acquire();
    const NativeScope scope;
    std::string text(32, '\0');
    auto size = llama_token_to_piece(loaded->vocab, token, text.data(), static_cast<std::int32_t>(text.size()), 0, special);
    if (size < 0) {
        text.resize(static_cast<std::size_t>(-size));
        size = llama_token_to_piece(loaded->vocab, token, text.data(), -size, 0, special);
    }
    text.resize(static_cast<std::size_t>(std::max(size, 0)));
    return text;
}

bool Model::is_end_of_generation(std::int32_t token) const {
    const auto loaded = acquire();
    return llama_vocab_is_eog(loaded->vocab, token);
}

}  // namespace llama_moe
