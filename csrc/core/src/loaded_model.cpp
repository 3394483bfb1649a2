#include "loaded_model.h"

#include <algorithm>
#include <optional>

#include "backend.h"
#include "expert_kernels.h"
#include "failed_devices.h"
#include "ggml.h"
#include "host_memory.h"
#include "llama_moe/error.h"
#include "llama_moe/expert_backend.h"
#include "llama_moe/log.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

llama_model_params native_params(LoadedModel& loaded, const ModelOptions& options, const ResolvedPlacement& placement) {
    for (const auto& entry : loaded.accelerators->entries()) {
        loaded.devices.push_back(entry.device);
    }
    loaded.devices.push_back(nullptr);
    for (const auto& rule : placement.overrides) {
        loaded.patterns.push_back(rule.pattern);
        // Not the device's own pointer for the CPU: llama.cpp compares with this one to consider repacked buffers.
        auto* type = rule.device == "CPU" ? ggml_backend_cpu_buffer_type() : ggml_backend_dev_buffer_type(loaded.accelerators->find(rule.device));
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
    loaded.worker_use = std::make_shared<WorkerUse>(loaded.devices, WorkerUse::Kind::model);
    ErrorLog errors;
    try {
        std::optional<experts::KernelsScope> packing;
        if (loaded.packed) {
            register_expert_backend();
            packing.emplace();
        }
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

// llama.cpp's dry run maps nothing. What a load that maps the file would make of weights in host memory is asked for by name: with a
// device that offers pinned memory llama.cpp chooses that first, and then, because of the mapping, plain memory (llama-model-loader.cpp,
// buft_for_tensor).
void make_dry(llama_model_params& params, const LoadedModel& loaded, const ModelOptions& options) {
    params.no_alloc = true;
    params.check_tensors = false;
    params.load_mode = LLAMA_LOAD_MODE_NONE;
    if (loaded.accelerators->offer_pinned_memory() && options.host_memory != "pageable") {
        params.no_host = params.no_host || loaded.mapped;
        params.use_extra_bufts = false;
    }
}

// Reading a vocabulary takes longer than all the rest of a dry run, and its size is all that matters to memory.
std::vector<llama_model_kv_override> without_vocabulary(const GgufInfo& gguf) {
    if (gguf.vocab_size == 0) {
        return {};
    }
    llama_model_kv_override kind{};
    kind.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    std::snprintf(kind.key, sizeof(kind.key), "tokenizer.ggml.model");
    std::snprintf(kind.val_str, sizeof(kind.val_str), "no_vocab");
    llama_model_kv_override size{};
    size.tag = LLAMA_KV_OVERRIDE_TYPE_INT;
    std::snprintf(size.key, sizeof(size.key), "%s.vocab_size", gguf.architecture.c_str());
    size.val_i64 = gguf.vocab_size;
    return {kind, size, llama_model_kv_override{}};
}

std::shared_ptr<LoadedModel> prepare(const GgufInfo& gguf, const ModelOptions& options, const ResolvedPlacement& placement,
                                     std::shared_ptr<const Accelerators> accelerators) {
    auto loaded = std::make_shared<LoadedModel>();
    loaded->accelerators = std::move(accelerators);
    loaded->host_layers = placement.host_layers;
    loaded->memory = count_memory(gguf, placement.tensors, *loaded->accelerators);
    const KernelChoice kernels = choose_kernels(options, placement, *loaded->accelerators);
    loaded->packed = kernels.packed;
    if (host_bytes(placement) > 0 && !kernels.reason.empty()) {
        log_line(LogLevel::info, std::string(kernels.packed ? "llama_moe's" : "ggml's") + " kernels for weights in host memory: " + kernels.reason);
    }
    return loaded;
}

void add_lora_memory(LoadedModel& loaded) {
    loaded.memory.insert(loaded.memory.end(), loaded.loras.memory.begin(), loaded.loras.memory.end());
}

}  // namespace

std::shared_ptr<LoadedModel> load_model(const GgufInfo& gguf, const ModelOptions& options, const ResolvedPlacement& placement,
                                        std::shared_ptr<const Accelerators> accelerators, LoadControl& control) {
    const auto loras = read_loras(gguf, options.lora);  // what is wrong with them is said before the weights are read
    auto loaded = prepare(gguf, options, placement, std::move(accelerators));
    load_native(*loaded, gguf, native_params(*loaded, options, placement), control);
    for (const auto& file : loras) {
        loaded->loras.load(loaded->model, file);
        loaded->fingerprint = (loaded->fingerprint ^ fingerprint(file)) * 1099511628211ull;
    }
    add_lora_memory(*loaded);
    return loaded;
}

std::shared_ptr<LoadedModel> open_dry(const GgufInfo& gguf, const ModelOptions& options, const ResolvedPlacement& placement,
                                      std::shared_ptr<const Accelerators> accelerators) {
    auto loaded = prepare(gguf, options, placement, std::move(accelerators));
    loaded->dry = true;
    auto params = native_params(*loaded, options, placement);
    make_dry(params, *loaded, options);
    const auto overrides = without_vocabulary(gguf);
    params.kv_overrides = overrides.empty() ? nullptr : overrides.data();
    LoadControl control;
    load_native(*loaded, gguf, params, control);
    for (const auto& file : read_loras(gguf, options.lora)) {
        loaded->loras.open_dry(loaded->model, file);
    }
    add_lora_memory(*loaded);
    return loaded;
}

std::uint64_t allocated_bytes(const TensorInfo& tensor, ggml_backend_dev_t device) {
    return allocated_bytes(tensor, ggml_backend_dev_buffer_type(device));
}

std::vector<MemoryRow> count_memory(const GgufInfo& gguf, const std::vector<TensorPlacement>& placement, const Accelerators& accelerators) {
    std::map<std::string, const TensorInfo*> by_name;
    for (const auto& tensor : gguf.tensors) {
        by_name[tensor.name] = &tensor;
    }
    std::map<std::pair<std::string, std::string>, std::uint64_t> sums;
    for (const auto& tensor : placement) {
        ggml_backend_dev_t device = accelerators.find(tensor.device);
        const std::string role = tensor.role == TensorRole::experts ? "experts" : "weights";
        sums[{tensor.device, role}] += allocated_bytes(*by_name.at(tensor.name), ggml_backend_dev_buffer_type(device));
    }
    std::vector<MemoryRow> rows;
    for (const auto& [key, bytes] : sums) {
        rows.push_back({key.first, key.second, bytes});
    }
    return rows;
}

LoadedModel::~LoadedModel() {
    if (model == nullptr) {
        return;
    }
    // On a thread that can be given up: freeing memory on a worker that died or hangs never returns.
    try {
        run_native([native = model, keep = accelerators, use = worker_use] { llama_model_free(native); }, within_close_limit(devices), {}, devices);
    } catch (const std::exception& error) {
        log_line(LogLevel::error, std::string("a model could not be freed: ") + error.what());
    }
}

}  // namespace llama_moe
