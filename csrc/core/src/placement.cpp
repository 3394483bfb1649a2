#include "llama_moe/placement.h"

#include <algorithm>
#include <numeric>
#include <regex>
#include <set>

#include "backend.h"
#include "failed_devices.h"
#include "llama.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

std::string gib(std::uint64_t bytes) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.2f GiB", static_cast<double>(bytes) / (1ull << 30));
    return text;
}

std::string range_text(int first, int last) {
    return first == last ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(last);
}

// The regex of the expert tensors of some projections, in the layers given; no layers: in all.
std::string expert_pattern(const std::vector<std::string>& projections, const std::vector<int>& layers) {
    std::string names;
    bool merged = false;
    for (const auto& projection : projections) {
        names += (names.empty() ? "" : "|") + projection;
        merged = merged || projection != "down";
    }
    if (merged) {
        names += "|gate_up";  // holds both, so it goes where either is sent
    }
    std::string blocks = "\\.";
    if (!layers.empty()) {
        blocks = "^blk\\.(";
        for (std::size_t i = 0; i < layers.size(); i++) {
            blocks += (i == 0 ? "" : "|") + std::to_string(layers[i]);
        }
        blocks += ")\\.";
    }
    return blocks + "ffn_(" + names + ")_(ch|)exps";
}

std::vector<int> layer_range(int first, int last) {
    std::vector<int> layers(static_cast<std::size_t>(std::max(0, last - first)));
    std::iota(layers.begin(), layers.end(), first);
    return layers;
}

// Layers that have expert tensors, for messages: "1-27".
std::string expert_layers(const GgufInfo& gguf) {
    std::set<int> layers;
    for (const auto& tensor : gguf.tensors) {
        if (tensor.role == TensorRole::experts) {
            layers.insert(tensor.layer);
        }
    }
    return layers.empty() ? "none" : range_text(*layers.begin(), *layers.rbegin());
}

// Where llama.cpp puts each layer and the output by itself (llama-model.cpp, load_tensors).
class LayerDevices {
   public:
    LayerDevices(const GgufInfo& gguf, const ModelOptions& options, std::vector<std::string> accelerators, const std::vector<float>& split)
        : accelerators_(std::move(accelerators)) {
        const int layers = gguf.layer_count + 1;  // the output counts as one
        const int wanted = options.gpu_layers < 0 ? layers : options.gpu_layers;
        first_ = std::max(layers - wanted, 0);
        count_ = accelerators_.empty() ? 0 : std::min(wanted, layers);
        float sum = 0;
        for (const float share : split) {
            sum += share;
            ends_.push_back(sum);
        }
        for (float& end : ends_) {
            end /= sum;
        }
        output_ = gguf.layer_count;
    }

    std::string layer(int index) const {
        if (index < first_ || index - first_ >= count_) {
            return "CPU";
        }
        const float at = static_cast<float>(index - first_) / static_cast<float>(count_);
        return accelerators_[static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), at) - ends_.begin())];
    }
    std::string output() const { return layer(output_); }

   private:
    std::vector<std::string> accelerators_;
    std::vector<float> ends_;
    int first_ = 0;
    int count_ = 0;
    int output_ = 0;
};

bool starts_with(const std::string& text, const char* prefix) {
    return text.rfind(prefix, 0) == 0;
}

// The devices a tensor of the file is loaded to when no rule says otherwise, with its role on each.
std::vector<std::pair<std::string, TensorRole>> default_devices(const TensorInfo& tensor, const GgufInfo& gguf, const LayerDevices& devices,
                                                                bool tied_output) {
    if (tensor.layer >= 0) {
        return {{devices.layer(tensor.layer), tensor.role}};
    }
    if (tensor.role == TensorRole::embedding) {
        std::vector<std::pair<std::string, TensorRole>> result = {{"CPU", TensorRole::embedding}};
        // A tied embedding is loaded a second time as the output, unless both are in the same memory.
        if (tied_output && starts_with(tensor.name, "token_embd.weight") && devices.output() != "CPU") {
            result.emplace_back(devices.output(), TensorRole::output);
        }
        return result;
    }
    if (starts_with(tensor.name, "rope_f")) {  // loaded once for each device that has a layer
        std::vector<std::pair<std::string, TensorRole>> result;
        std::set<std::string> seen;
        for (int i = 0; i < gguf.layer_count; i++) {
            if (seen.insert(devices.layer(i)).second) {
                result.emplace_back(devices.layer(i), TensorRole::weights);
            }
        }
        return result;
    }
    if (starts_with(tensor.name, "token_embd_norm")) {
        return {{"CPU", TensorRole::weights}};
    }
    return {{devices.output(), tensor.role}};
}

struct CompiledRule {
    std::regex pattern;
    std::string device;
};

std::vector<CompiledRule> compile(const std::vector<PlacementOverride>& overrides) {
    std::vector<CompiledRule> rules;
    for (const auto& rule : overrides) {
        try {
            rules.push_back({std::regex(rule.pattern), rule.device});
        } catch (const std::regex_error& error) {
            throw PlacementError("'" + rule.pattern + "' is not a valid regular expression (ECMAScript): " + error.what());
        }
    }
    return rules;
}

std::vector<TensorPlacement> place(const GgufInfo& gguf, const LayerDevices& devices, const std::vector<PlacementOverride>& overrides) {
    const auto rules = compile(overrides);
    const bool tied = std::none_of(gguf.tensors.begin(), gguf.tensors.end(), [](const auto& t) { return t.name == "output.weight"; });
    std::vector<TensorPlacement> placed;
    for (const auto& tensor : gguf.tensors) {
        if (tensor.layer >= gguf.layer_count - gguf.nextn_layer_count && tensor.layer >= 0) {
            continue;  // multi-token-prediction layers are in the file, but llama.cpp does not load them
        }
        const auto rule = std::find_if(rules.begin(), rules.end(), [&](const auto& r) { return std::regex_search(tensor.name, r.pattern); });
        std::set<std::string> seen;
        for (const auto& [device, role] : default_devices(tensor, gguf, devices, tied)) {
            const std::string where = rule == rules.end() ? device : rule->device;
            if (seen.insert(where).second) {
                placed.push_back({tensor.name, where, role, tensor.bytes});
            }
        }
    }
    return placed;
}

std::string check_device(const std::string& name, const std::vector<std::string>& accelerators) {
    ggml_backend_dev_t device = find_device(name);
    if (device == nullptr) {
        throw PlacementError("no device '" + name + "'; there are: " + known_devices());
    }
    const std::string found = device_name(device);
    if (found != "CPU" && std::find(accelerators.begin(), accelerators.end(), found) == accelerators.end()) {
        throw PlacementError("device '" + name + "' is not among the model's devices; add it to `devices`");
    }
    return found;
}

void check_matches(const GgufInfo& gguf, const std::vector<PlacementOverride>& overrides) {
    const auto rules = compile(overrides);
    for (std::size_t i = 0; i < rules.size(); i++) {
        const bool any = std::any_of(gguf.tensors.begin(), gguf.tensors.end(),
                                     [&](const auto& tensor) { return std::regex_search(tensor.name, rules[i].pattern); });
        if (!any) {
            throw PlacementError("no tensor matches '" + overrides[i].pattern + "'; the model has blocks " +
                                 range_text(0, gguf.layer_count - 1) + ", with experts in " + expert_layers(gguf));
        }
    }
}

int check_count(const GgufInfo& gguf, const char* name, int count) {
    if (count < 0 || count > gguf.layer_count) {
        throw PlacementError(std::string(name) + "(" + std::to_string(count) + "): the model has " + std::to_string(gguf.layer_count) +
                             " layers; give 0 to " + std::to_string(gguf.layer_count));
    }
    return count;
}

// The layers whose experts a policy sends to host memory.
std::vector<int> policy_layers(const GgufInfo& gguf, const PlacementPolicy& policy) {
    const int layers = gguf.layer_count - gguf.nextn_layer_count;
    switch (policy.kind) {
        case PlacementPolicy::Kind::cpu_first: return layer_range(0, check_count(gguf, "cpu_first", policy.count));
        case PlacementPolicy::Kind::cpu_last: return layer_range(std::max(0, layers - check_count(gguf, "cpu_last", policy.count)), layers);
        case PlacementPolicy::Kind::cpu_layers: break;
        default: return {};
    }
    for (const int layer : policy.layers) {
        if (layer < 0 || layer >= gguf.layer_count) {
            throw PlacementError("cpu_layers: there is no layer " + std::to_string(layer) + "; the model has layers " +
                                 range_text(0, gguf.layer_count - 1));
        }
    }
    return policy.layers;
}

std::vector<PlacementOverride> policy_overrides(const GgufInfo& gguf, const PlacementPolicy& policy,
                                                const std::vector<std::string>& accelerators) {
    using Kind = PlacementPolicy::Kind;
    if (policy.kind == Kind::gpu || policy.kind == Kind::fit) {
        return {};
    }
    std::vector<PlacementOverride> overrides;
    if (policy.kind == Kind::rules) {
        if (policy.rules.empty()) {
            throw PlacementError("rules is empty; give at least one (regex, device)");
        }
        for (const auto& [pattern, device] : policy.rules) {
            overrides.push_back({pattern, check_device(device, accelerators)});
        }
    } else {
        const bool has_experts =
            std::any_of(gguf.tensors.begin(), gguf.tensors.end(), [](const auto& tensor) { return tensor.role == TensorRole::experts; });
        if (!has_experts) {
            throw PlacementError("'" + gguf.path + "' (architecture " + gguf.architecture +
                                 ") has no experts to place; it is a dense model: use gpu() and `gpu_layers`");
        }
        if (policy.projections.empty()) {
            throw PlacementError("projections is empty; give some of \"up\", \"gate\", \"down\"");
        }
        for (const auto& projection : policy.projections) {
            if (projection != "up" && projection != "gate" && projection != "down") {
                throw PlacementError("'" + projection + "' is not a projection; give some of \"up\", \"gate\", \"down\"");
            }
        }
        const auto layers = policy_layers(gguf, policy);
        if (layers.empty() && policy.kind != Kind::cpu) {
            if (policy.kind == Kind::cpu_layers) {
                throw PlacementError("cpu_layers is empty; use gpu() to leave all experts with their layers");
            }
            return {};  // cpu_first(0) and cpu_last(0): nothing to move
        }
        overrides.push_back({expert_pattern(policy.projections, layers), "CPU"});
    }
    check_matches(gguf, overrides);
    return overrides;
}

struct Capacity {
    std::string device;
    std::uint64_t bytes;
};

// Bytes missing on each device that is too small; empty when the placement fits.
std::string shortfall(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy, const LayerDevices& devices,
                      const std::vector<TensorPlacement>& placed, const std::vector<Capacity>& capacities) {
    std::string missing;
    const std::uint64_t layer_kv = kv_elements_per_token(gguf) * sizeof(ggml_fp16_t) * options.fit_context_tokens;
    for (const auto& capacity : capacities) {
        const bool host = capacity.device == "CPU";
        std::uint64_t needed = host ? 0 : policy.reserve;
        for (const auto& tensor : placed) {
            needed += tensor.device == capacity.device ? tensor.bytes : 0;
        }
        for (int i = 0; i < gguf.layer_count; i++) {
            needed += devices.layer(i) == capacity.device ? layer_kv : 0;
        }
        if (needed > capacity.bytes) {
            missing += (missing.empty() ? "" : "; ") + capacity.device + " needs " + gib(needed) + " and has " + gib(capacity.bytes) +
                       " (" + gib(needed - capacity.bytes) + " short)";
        }
    }
    return missing;
}

// The smallest number of leading layers whose experts must be in host memory for everything to fit.
std::vector<PlacementOverride> fit_overrides(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                             const LayerDevices& devices, const std::vector<Capacity>& capacities, std::string& summary) {
    std::string missing;
    for (int n = 0; n <= gguf.layer_count; n++) {
        std::vector<PlacementOverride> overrides;
        if (n > 0) {
            overrides.push_back({expert_pattern({"up", "gate", "down"}, layer_range(0, n)), "CPU"});
        }
        missing = shortfall(gguf, options, policy, devices, place(gguf, devices, overrides), capacities);
        if (missing.empty()) {
            summary = n == 0 ? "fit: all experts stay with their layers"
                             : "fit: experts of the first " + std::to_string(n) + " of " + std::to_string(gguf.layer_count) + " layers are in host memory";
            return overrides;
        }
    }
    throw DoesNotFitError("'" + gguf.path + "' does not fit even with all experts in host memory: " + missing +
                          "; use a smaller context, fewer gpu_layers or a smaller reserve");
}

}  // namespace

std::vector<ggml_backend_dev_t> chosen_accelerators(const ModelOptions& options) {
    if (!options.devices) {
        return default_accelerators();
    }
    std::vector<ggml_backend_dev_t> chosen;
    for (const auto& name : *options.devices) {
        ggml_backend_dev_t device = find_device(name);
        if (device == nullptr) {
            throw PlacementError("no device '" + name + "'; there are: " + known_devices());
        }
        if (!is_accelerator(device)) {
            continue;  // the CPU is always there
        }
        if (any_failed({device})) {
            throw PlacementError("device '" + name + "' (" + ggml_backend_dev_description(device) +
                                 ") failed earlier; it cannot be used again in this process");
        }
        if (std::find(chosen.begin(), chosen.end(), device) == chosen.end()) {
            chosen.push_back(device);
        }
    }
    return chosen;
}

void ModelOptions::validate() const {
    if (gpu_layers < -1) {
        throw InvalidOptionError("gpu_layers is " + std::to_string(gpu_layers) + "; it must be -1 (all), 0 or more");
    }
    static const std::set<std::string> modes = {"mmap", "pageable", "pinned", "locked"};
    if (modes.count(host_memory) == 0) {
        throw InvalidOptionError("host_memory is '" + host_memory + "'; it must be one of mmap, pageable, pinned, locked");
    }
}

std::uint64_t kv_elements_per_token(const GgufInfo& gguf) {
    const auto heads = std::max<std::int64_t>(1, gguf.architecture_integer("attention.head_count", 1));
    const auto kv_heads = gguf.architecture_integer("attention.head_count_kv", heads);
    const auto head_size = gguf.architecture_integer("embedding_length", 0) / heads;
    const auto key = gguf.architecture_integer("attention.key_length", head_size);
    const auto value = gguf.architecture_integer("attention.value_length", head_size);
    return static_cast<std::uint64_t>(std::max<std::int64_t>(0, kv_heads * (key + value)));
}

ResolvedPlacement resolve_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy) {
    start_backend();
    options.validate();
    const auto chosen = chosen_accelerators(options);
    if (chosen.size() > llama_max_devices()) {
        throw PlacementError(std::to_string(chosen.size()) + " devices; llama.cpp uses at most " + std::to_string(llama_max_devices()));
    }
    ResolvedPlacement resolved;
    std::vector<Capacity> capacities;
    for (auto* device : chosen) {
        std::size_t free = 0;
        std::size_t total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        if (total == 0) {  // a device that cannot tell shares the host's memory
            ggml_backend_dev_memory(cpu_device(), &free, &total);
        }
        resolved.accelerators.push_back(device_name(device));
        resolved.tensor_split.push_back(static_cast<float>(std::max<std::size_t>(free, 1)));
        capacities.push_back({device_name(device), policy.vram.value_or(free)});
    }
    const LayerDevices devices(gguf, options, resolved.accelerators, resolved.tensor_split);
    resolved.overrides = policy_overrides(gguf, policy, resolved.accelerators);
    if (policy.kind == PlacementPolicy::Kind::fit) {
        if (policy.ram) {
            capacities.push_back({"CPU", *policy.ram});
        }
        resolved.overrides = fit_overrides(gguf, options, policy, devices, capacities, resolved.summary);
    }
    resolved.tensors = place(gguf, devices, resolved.overrides);
    for (int i = 0; i < gguf.layer_count; i++) {
        resolved.host_layers += devices.layer(i) == "CPU" ? 1 : 0;
    }
    return resolved;
}

std::vector<TensorPlacement> resolve_placement(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy,
                                               const Poll& poll) {
    start_backend();
    auto tensors = std::make_shared<std::vector<TensorPlacement>>();
    run_native([=] { *tensors = resolve_placement(read_gguf(path), options, policy).tensors; }, poll, {}, chosen_accelerators(options));
    return *tensors;
}

}  // namespace llama_moe
