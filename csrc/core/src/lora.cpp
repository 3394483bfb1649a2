#include "lora.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>

#include "backend.h"
#include "eval_callback.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "llama-adapter.h"  // an adapter without data, for dry runs; this is the only file that includes it and llama-model.h
#include "llama-model.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

bool take_suffix(std::string& name, const std::string& suffix) {
    if (name.size() < suffix.size() || name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) {
        return false;
    }
    name.resize(name.size() - suffix.size());
    return true;
}

std::int64_t extent(const TensorInfo& tensor, std::size_t dimension) {
    return dimension < tensor.shape.size() ? tensor.shape[dimension] : 1;
}

std::string shape_text(const TensorInfo& tensor) {
    std::string text;
    for (const auto size : tensor.shape) {
        text += (text.empty() ? "" : " x ") + std::to_string(size);
    }
    return text;
}

std::string text_of(const GgufInfo& gguf, const char* key) {
    const auto found = gguf.metadata.find(key);
    const auto* text = found == gguf.metadata.end() ? nullptr : std::get_if<std::string>(&found->second);
    return text == nullptr ? "" : *text;
}

float number_of(const GgufInfo& gguf, const char* key) {
    const auto found = gguf.metadata.find(key);
    const auto* number = found == gguf.metadata.end() ? nullptr : std::get_if<double>(&found->second);
    return number == nullptr ? 0.0f : static_cast<float>(*number);
}

[[noreturn]] void refuse(const std::string& path, const std::string& reason) {
    throw ModelLoadError("'" + path + "' " + reason);
}

void check_kind(const GgufInfo& file, const GgufInfo& model) {
    if (text_of(file, "general.type") != "adapter" || text_of(file, "adapter.type") != "lora") {
        refuse(file.path, "is not a LoRA adapter: its general.type is '" + text_of(file, "general.type") + "' and its adapter.type '" +
                              text_of(file, "adapter.type") + "', not 'adapter' and 'lora'; llama.cpp's convert_lora_to_gguf.py writes them");
    }
    if (file.architecture != model.architecture) {
        refuse(file.path, "is an adapter for a model of the architecture '" + file.architecture + "'; '" + model.path + "' is of '" +
                              model.architecture + "'");
    }
    if (file.metadata.count("adapter.alora.invocation_tokens") > 0) {
        refuse(file.path, "is an activated LoRA, which only counts behind certain tokens; only adapters that always count are supported");
    }
}

void check_format(const std::string& path, const TensorInfo& tensor) {
    const auto type = static_cast<ggml_type>(tensor.type_id);
    if (type != GGML_TYPE_F32 && ggml_get_type_traits(type)->to_float == nullptr) {
        refuse(path, "has '" + tensor.name + "' in the format " + tensor.type + ", with which nothing can be computed");
    }
}

// What llama.cpp applies (llama-graph.cpp): B (A x) beside each product of a matrix or of stacked experts, and beside the look-up of
// embeddings, where A and B change places.
void check_pair(const std::string& path, const GgufInfo& model, const TensorInfo& weight, const LoraFile::Pair& pair) {
    const bool stacked = extent(weight, 2) > 1;
    if (stacked && weight.role != TensorRole::experts) {
        refuse(path, "changes '" + weight.name + "', to which llama.cpp applies no LoRA");
    }
    if (weight.type == "NVFP4") {
        refuse(path, "changes '" + weight.name + "', which is in NVFP4: llama.cpp applies no LoRA to that");
    }
    const bool embedding = weight.name == "token_embd.weight";
    if (embedding) {
        const auto is_output = [](const TensorInfo& tensor) { return tensor.name == "output.weight"; };
        if (std::none_of(model.tensors.begin(), model.tensors.end(), is_output)) {
            refuse(path, "changes '" + weight.name + "', which is the output of this model too; llama.cpp applies no LoRA to that");
        }
    }
    const std::int64_t rank = embedding ? extent(pair.a, 0) : extent(pair.a, 1);
    const bool fits = embedding ? extent(pair.b, 1) == extent(weight, 0) && extent(pair.a, 1) == extent(weight, 1) && extent(pair.b, 0) == rank
                                : extent(pair.a, 0) == extent(weight, 0) && extent(pair.b, 1) == extent(weight, 1) && extent(pair.b, 0) == rank;
    if (!fits || extent(pair.a, 2) != extent(weight, 2) || extent(pair.b, 2) != extent(weight, 2) || extent(pair.a, 3) != 1 || extent(pair.b, 3) != 1) {
        refuse(path, "does not fit '" + model.path + "': '" + weight.name + "' is " + shape_text(weight) + " there, and the adapter has " +
                         shape_text(pair.a) + " and " + shape_text(pair.b) + " for it");
    }
    check_format(path, pair.a);
    check_format(path, pair.b);
}

LoraFile read_lora(const GgufInfo& model, const LoraOptions& options) {
    if (!std::isfinite(options.scale)) {
        throw InvalidOptionError("the scale of LoRA adapter '" + options.path + "' is " + std::to_string(options.scale) + "; it must be a finite number");
    }
    const GgufInfo file = read_gguf(options.path);
    check_kind(file, model);
    LoraFile lora{options.path, options.scale, number_of(file, "adapter.lora.alpha"), {}};
    std::map<std::string, std::pair<const TensorInfo*, const TensorInfo*>> halves;
    for (const auto& tensor : file.tensors) {
        std::string weight = tensor.name;
        if (take_suffix(weight, ".lora_a")) {
            halves[weight].first = &tensor;
        } else if (take_suffix(weight, ".lora_b")) {
            halves[weight].second = &tensor;
        } else if (take_suffix(weight, "_norm.weight")) {
            log_line(LogLevel::warning, "'" + options.path + "': llama.cpp does not apply its '" + tensor.name + "'");
        } else {
            refuse(options.path, "has a tensor '" + tensor.name + "'; those of a LoRA adapter end with .lora_a or .lora_b");
        }
    }
    if (halves.empty()) {
        refuse(options.path, "is a LoRA adapter without tensors");
    }
    std::map<std::string, const TensorInfo*> weights;
    for (const auto& tensor : model.tensors) {
        if (tensor.layer < model.layer_count - model.nextn_layer_count) {  // the others are not loaded
            weights[tensor.name] = &tensor;
        }
    }
    for (const auto& [name, half] : halves) {
        if (half.first == nullptr || half.second == nullptr) {
            refuse(options.path, "has only one of '" + name + ".lora_a' and '" + name + ".lora_b'");
        }
        const auto weight = weights.find(name);
        if (weight == weights.end()) {
            refuse(options.path, "changes '" + name + "', which '" + model.path + "' does not have: it is an adapter for another model");
        }
        const LoraFile::Pair pair{name, *half.first, *half.second};
        check_pair(options.path, model, *weight->second, pair);
        lora.pairs.push_back(pair);
    }
    return lora;
}

// Where llama.cpp puts an adapter's tensors: beside the weight, but never in the buffers that the CPU has for rearranged weights.
ggml_backend_buffer_type_t buffer_type_beside(const ggml_tensor* weight) {
    ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(weight->buffer);
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    const bool rearranged = device != nullptr && is_host_buffer(type) && !ggml_backend_buft_is_host(type);
    return rearranged ? ggml_backend_cpu_buffer_type() : type;
}

ggml_tensor* tensor_without_data(ggml_context* context, const TensorInfo& info, ggml_backend_buffer_t buffer) {
    ggml_tensor* tensor =
        ggml_new_tensor(context, static_cast<ggml_type>(info.type_id), static_cast<int>(info.shape.size()), info.shape.data());
    ggml_set_name(tensor, info.name.c_str());
    tensor->buffer = buffer;  // so that the scheduler allocates nothing for it, as llama.cpp does in its dry runs
    return tensor;
}

}  // namespace

std::vector<LoraFile> read_loras(const GgufInfo& model, const std::vector<LoraOptions>& options) {
    std::vector<LoraFile> files;
    for (const auto& option : options) {
        auto file = read_lora(model, option);
        if (file.scale != 0.0f) {
            files.push_back(std::move(file));
        }
    }
    return files;
}

void LoadedLoras::load(llama_model* model, const LoraFile& file) {
    ErrorLog errors;
    const QuietLog quiet;  // it has a line for each tensor
    llama_adapter_lora* adapter = nullptr;
    try {
        adapter = llama_adapter_lora_init(model, file.path.c_str());
    } catch (const NativeAbort& abort) {
        throw ModelLoadError("cannot load the LoRA adapter '" + file.path + "': " + abort.what());
    }
    if (adapter == nullptr) {
        const std::string reason = errors.text("llama.cpp gave no reason");
        if (reason.find("allocate") != std::string::npos) {
            throw DoesNotFitError("out of memory while loading the LoRA adapter '" + file.path + "': " + reason);
        }
        throw ModelLoadError("cannot load the LoRA adapter '" + file.path + "': " + reason);
    }
    add(adapter, file.scale);
}

void LoadedLoras::open_dry(llama_model* model, const LoraFile& file) {
    auto adapter = std::make_unique<llama_adapter_lora>(model);
    adapter->alpha = file.alpha;
    std::map<ggml_backend_buffer_type_t, std::pair<ggml_context*, ggml_backend_buffer_t>> places;
    for (const auto& pair : file.pairs) {
        const ggml_tensor* weight = model->get_tensor(pair.weight.c_str());
        if (weight == nullptr) {
            refuse(file.path, "changes '" + pair.weight + "', which llama.cpp does not load");
        }
        auto& [context, buffer] = places[buffer_type_beside(weight)];
        if (context == nullptr) {
            const ggml_init_params params{2 * file.pairs.size() * ggml_tensor_overhead(), nullptr, /*no_alloc=*/true};
            adapter->ctxs.emplace_back(context = ggml_init(params));
            adapter->bufs.emplace_back(buffer = ggml_backend_buft_alloc_buffer(buffer_type_beside(weight), 0));
        }
        ggml_tensor* a = tensor_without_data(context, pair.a, buffer);
        ggml_tensor* b = tensor_without_data(context, pair.b, buffer);
        adapter->ab_map[pair.weight] = llama_adapter_lora_weight(a, b);
    }
    model->loras.insert(adapter.get());
    add(adapter.release(), file.scale);
}

void LoadedLoras::add(llama_adapter_lora* adapter, float scale) {
    // As weights have it: otherwise the scheduler copies an adapter of experts in host memory to the accelerator for each token, where it
    // now computes beside the experts.
    for (const auto& buffer : adapter->bufs) {
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    adapters.push_back(adapter);
    scales.push_back(scale);
    for (const auto& [name, pair] : adapter->ab_map) {
        for (const ggml_tensor* tensor : {pair.a, pair.b}) {
            ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(tensor->buffer);
            const std::size_t bytes = ggml_backend_buft_get_alloc_size(type, tensor);
            add_bytes(memory, buffer_device(type), "adapters", GGML_PAD(bytes, ggml_backend_buft_get_alignment(type)));
        }
    }
}

std::uint64_t fingerprint(const LoraFile& file) {
    std::uint64_t hash = 1469598103934665603ull;  // FNV-1a over 8-byte words, 64 bits
    const auto add = [&hash](std::uint64_t word) { hash = (hash ^ word) * 1099511628211ull; };
    std::ifstream input(file.path, std::ios::binary);
    std::vector<std::uint64_t> words(1 << 17);
    do {
        std::fill(words.begin(), words.end(), 0);
        input.read(reinterpret_cast<char*>(words.data()), static_cast<std::streamsize>(words.size() * sizeof(std::uint64_t)));
        const auto count = (static_cast<std::size_t>(input.gcount()) + 7) / 8;
        for (std::size_t i = 0; i < count; i++) {
            add(words[i]);
        }
    } while (input);
    std::uint32_t scale = 0;
    std::memcpy(&scale, &file.scale, sizeof(scale));
    add(scale);
    return hash;
}

void use_loras(llama_context* context, const LoadedLoras& loras) {
    auto adapters = loras.adapters;
    auto scales = loras.scales;
    llama_set_adapters_lora(context, adapters.data(), adapters.size(), scales.data());
    // llama.cpp would do it in the next decode: memory that is not there is found now, and reports know the size of the buffers.
    reserve_compute_buffers(context);
}

}  // namespace llama_moe
