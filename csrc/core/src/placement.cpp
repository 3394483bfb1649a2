#include "llama_moe/placement.h"

#include <algorithm>
#include <numeric>
#include <regex>
#include <set>

#include "accelerators.h"
#include "backend.h"
#include "fit.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "native_thread.h"
#include "placement_rules.h"

namespace llama_moe {
namespace {

std::string range_text(int first, int last) {
    return first == last ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(last);
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

std::string check_device(const std::string& name, const Accelerators& accelerators) {
    if (auto* device = accelerators.find(name)) {
        return device_name(device);
    }
    if (find_device(name) == nullptr) {
        std::string known = known_devices();
        for (const auto& entry : accelerators.entries()) {
            known += is_hypothetical(entry.device) ? ", " + entry.name : "";
        }
        throw PlacementError("no device '" + name + "'; there are: " + known);
    }
    throw PlacementError("device '" + name + "' is not among the model's devices; add it to `devices`");
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

}  // namespace

LayerDevices::LayerDevices(const GgufInfo& gguf, const ModelOptions& options, const Accelerators& accelerators, const std::vector<float>& split) {
    for (const auto& entry : accelerators.entries()) {
        accelerators_.push_back(entry.name);
    }
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

std::string LayerDevices::layer(int index) const {
    if (index < first_ || index - first_ >= count_) {
        return "CPU";
    }
    const float at = static_cast<float>(index - first_) / static_cast<float>(count_);
    return accelerators_[static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), at) - ends_.begin())];
}

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

std::vector<PlacementOverride> policy_overrides(const GgufInfo& gguf, const PlacementPolicy& policy, const Accelerators& accelerators) {
    using Kind = PlacementPolicy::Kind;
    if (policy.kind == Kind::gpu) {
        return {};
    }
    std::vector<PlacementOverride> overrides;
    if (policy.kind == Kind::rules || policy.kind == Kind::fit) {
        if (policy.rules.empty() && policy.kind == Kind::rules) {
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

void ModelOptions::validate() const {
    if (gpu_layers < -1) {
        throw InvalidOptionError("gpu_layers is " + std::to_string(gpu_layers) + "; it must be -1 (all), 0 or more");
    }
    static const std::set<std::string> modes = {"mmap", "pageable", "pinned", "locked"};
    if (modes.count(host_memory) == 0) {
        throw InvalidOptionError("host_memory is '" + host_memory + "'; it must be one of mmap, pageable, pinned, locked");
    }
    static const std::set<std::string> kernels = {"auto", "llama_moe", "ggml"};
    if (kernels.count(expert_kernels) == 0) {
        throw InvalidOptionError("expert_kernels is '" + expert_kernels + "'; it must be one of auto, llama_moe, ggml");
    }
    if (expert_kernels == "llama_moe" && (!repack || host_memory == "pinned" || host_memory == "locked")) {
        throw InvalidOptionError("expert_kernels='llama_moe' packs weights, which " +
                                 (repack ? "host_memory='" + host_memory + "'" : std::string("repack=False")) + " does not allow; use expert_kernels='auto'");
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

std::vector<float> default_split(const Accelerators& accelerators) {
    std::vector<float> split;
    for (const auto& entry : accelerators.entries()) {
        split.push_back(static_cast<float>(std::max<std::uint64_t>(entry.free, 1)));
    }
    return split;
}

std::vector<bool> matched_tensors(const GgufInfo& gguf, const std::vector<PlacementOverride>& overrides) {
    const auto rules = compile(overrides);
    std::vector<bool> matched;
    for (const auto& tensor : gguf.tensors) {
        matched.push_back(std::any_of(rules.begin(), rules.end(), [&](const auto& rule) { return std::regex_search(tensor.name, rule.pattern); }));
    }
    return matched;
}

ResolvedPlacement place_tensors(const GgufInfo& gguf, const ModelOptions& options, const Accelerators& accelerators,
                                std::vector<PlacementOverride> overrides, std::vector<float> tensor_split) {
    ResolvedPlacement resolved;
    for (const auto& entry : accelerators.entries()) {
        resolved.accelerators.push_back(entry.name);
    }
    const LayerDevices devices(gguf, options, accelerators, tensor_split);
    resolved.tensors = place(gguf, devices, overrides);
    resolved.overrides = std::move(overrides);
    resolved.tensor_split = std::move(tensor_split);
    for (int i = 0; i < gguf.layer_count; i++) {
        resolved.host_layers += devices.layer(i) == "CPU" ? 1 : 0;
    }
    return resolved;
}

ResolvedPlacement resolve_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                    const std::shared_ptr<const Accelerators>& accelerators, const std::atomic<bool>& cancelled) {
    options.validate();
    if (policy.kind == PlacementPolicy::Kind::fit) {
        return fit_placement(gguf, options, policy, accelerators, cancelled);
    }
    return place_tensors(gguf, options, *accelerators, policy_overrides(gguf, policy, *accelerators), default_split(*accelerators));
}

ResolvedPlacement resolve_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy) {
    start_backend();
    const std::atomic<bool> never{false};
    return resolve_placement(gguf, options, policy, std::make_shared<const Accelerators>(options), never);
}

std::vector<TensorPlacement> resolve_placement(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy,
                                               const Poll& poll) {
    start_backend();
    struct Result {
        std::vector<TensorPlacement> tensors;
        std::atomic<bool> cancelled{false};
    };
    auto result = std::make_shared<Result>();
    run_native(
        [=] {
            const auto accelerators = std::make_shared<const Accelerators>(options);
            result->tensors = resolve_placement(read_gguf(path), options, policy, accelerators, result->cancelled).tensors;
        },
        poll, [result] { result->cancelled.store(true); }, chosen_accelerators(options));
    return result->tensors;
}

}  // namespace llama_moe
