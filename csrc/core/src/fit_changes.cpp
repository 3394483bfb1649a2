#include "fit_changes.h"

#include <algorithm>
#include <optional>

namespace llama_moe {
namespace {

using Change = std::function<void(ModelOptions&, PlacementPolicy&)>;

enum class Outcome { fits, lacks_host_memory, too_large };

constexpr int kContextStep = 256;  // llama.cpp rounds contexts up to multiples of this

// The largest of 1..most that `fits`; nothing when none does. What fits stays so when it gets smaller.
std::optional<int> largest(int most, const std::function<bool(int)>& fits) {
    if (most < 1 || !fits(1)) {
        return std::nullopt;
    }
    int low = 1;
    int high = most + 1;
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        (fits(middle) ? low : high) = middle;
    }
    return low;
}

}  // namespace

std::vector<std::string> changes_that_fit(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                          const std::vector<Shortfall>& missing, const FitWith& fit) {
    const auto outcome = [&](const Change& change) {
        ModelOptions changed = options;
        PlacementPolicy changed_policy = policy;
        change(changed, changed_policy);
        try {
            fit(changed, changed_policy);
            return Outcome::fits;
        } catch (const DoesNotFitError& error) {
            const bool only_host = std::all_of(error.shortfalls.begin(), error.shortfalls.end(), [](const auto& s) { return s.device == "CPU"; });
            return only_host ? Outcome::lacks_host_memory : Outcome::too_large;
        } catch (const InvalidOptionError&) {  // not possible for this model
            return Outcome::too_large;
        }
    };
    const auto fits = [&](const Change& change) { return outcome(change) == Outcome::fits; };
    std::vector<std::string> changes;
    const auto& engine = options.fit_for;
    const int context = engine.context_size > 0 ? engine.context_size : static_cast<int>(gguf.architecture_integer("context_length", 0));
    if (engine.context_pool == 0) {
        const auto steps = largest((context - 1) / kContextStep, [&](int n) {
            return fits([n](auto& changed, auto&) { changed.fit_for.context_size = n * kContextStep; });
        });
        if (steps) {
            changes.push_back("context_size=" + std::to_string(*steps * kContextStep));
        }
    }
    if (engine.kv_type == "f16" || engine.kv_type == "f32" || engine.kv_type == "bf16") {
        for (const char* type : {"q8_0", "q4_0"}) {
            if (fits([type](auto& changed, auto&) { changed.fit_for.kv_type = type; })) {
                changes.push_back(std::string("kv_type='") + type + "'");
                break;
            }
        }
    }
    const auto sequences = largest(engine.max_sequences - 1, [&](int n) {
        return fits([n](auto& changed, auto&) { changed.fit_for.max_sequences = n; });
    });
    if (sequences) {
        changes.push_back("max_sequences=" + std::to_string(*sequences));
    }
    std::uint64_t most = 0;
    bool accelerator = false;
    for (const auto& shortfall : missing) {
        most = std::max(most, shortfall.missing());
        accelerator = accelerator || shortfall.device != "CPU";
    }
    if (!accelerator) {
        return changes;
    }
    const int layers = options.gpu_layers < 0 ? gguf.layer_count + 1 : options.gpu_layers;
    // Fewer layers there are more here: the most that the accelerators can hold are the only ones that the host may hold too.
    const auto layers_of = [](int n) { return [n](ModelOptions& changed, PlacementPolicy&) { changed.gpu_layers = n; }; };
    const auto on_gpu = largest(layers - 1, [&](int n) { return outcome(layers_of(n)) != Outcome::too_large; });
    if (on_gpu && fits(layers_of(*on_gpu))) {
        changes.push_back("gpu_layers=" + std::to_string(*on_gpu));
    }
    if (policy.reserve >= most && fits([&](auto&, auto& changed) { changed.reserve = policy.reserve - most; })) {
        changes.push_back("reserve=" + std::to_string((policy.reserve - most) >> 20) + "MiB");
    }
    return changes;
}

}  // namespace llama_moe
