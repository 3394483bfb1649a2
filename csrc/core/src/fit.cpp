#include "fit.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>

#include "backend.h"
#include "dry_run.h"
#include "fit_changes.h"
#include "loaded_model.h"
#include "machine.h"
#include "native_context.h"
#include "placement_rules.h"

namespace llama_moe {
namespace {

// How much of a layer's experts is in host memory: nothing, the down projections, the other two, all.
constexpr int kAll = 3;
const std::array<std::vector<std::string>, kAll + 1> kMoved = {{{}, {"down"}, {"up", "gate"}, {"up", "gate", "down"}}};

// A search ends: each step after the first three measures one more placement.
constexpr int kMaxSteps = 24;

std::string size_text(std::uint64_t bytes) {
    char text[32];
    const bool large = bytes >= 1ull << 30;
    std::snprintf(text, sizeof(text), large ? "%.2f GiB" : "%.2f MiB", static_cast<double>(bytes) / (large ? 1ull << 30 : 1ull << 20));
    return text;
}

std::uint64_t bytes_of(const std::vector<MemoryRow>& rows, const std::string& device, const char* role = nullptr) {
    std::uint64_t bytes = 0;
    for (const auto& row : rows) {
        bytes += row.device == device && (role == nullptr || row.role == role) ? row.bytes : 0;
    }
    return bytes;
}

bool any_accelerator(const std::vector<Shortfall>& missing) {
    return std::any_of(missing.begin(), missing.end(), [](const auto& shortfall) { return shortfall.device != "CPU"; });
}

// "0-3, 7"
std::string range_list(const std::vector<int>& numbers) {
    std::string text;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) {
            last++;
        }
        text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]) + (last > i ? "-" + std::to_string(numbers[last]) : "");
        i = last + 1;
    }
    return text;
}

class Search {
   public:
    Search(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy, const Accelerators& accelerators, const Measure& measure)
        : gguf_(gguf),
          options_(options),
          policy_(policy),
          accelerators_(accelerators),
          measure_(measure),
          rules_(policy_overrides(gguf, policy, accelerators)),
          capacities_(capacities(accelerators, policy)),
          reserve_(std::min(policy.reserve, std::uint64_t{1} << 60)),
          split_(default_split(accelerators)) {
        weigh_layers();
    }

    ResolvedPlacement run();

   private:
    struct Layer {
        std::uint64_t others = 0;                     // bytes besides experts that go with the layer
        std::array<std::uint64_t, kAll + 1> moved{};  // bytes of experts that leave it at each level
    };
    struct Trial {
        ResolvedPlacement placement;
        std::vector<MemoryRow> rows;
        std::vector<Shortfall> missing;
    };

    void weigh_layers();
    std::vector<int> layers_at(int level, const std::vector<int>& levels) const;
    Trial attempt(const std::vector<int>& levels) const;
    std::vector<int> layers_on(const std::string& device) const;
    std::uint64_t keep(const std::vector<int>& layers, std::uint64_t room, std::vector<int>& levels) const;
    void balance(const Trial& all_moved);
    std::vector<int> estimate(const Trial& all_moved, const Trial& none_moved) const;
    bool move_more(const std::string& device, std::vector<int>& levels) const;
    bool move_less(const std::string& device, std::vector<int>& levels) const;
    ResolvedPlacement finished(Trial trial, const std::vector<int>& levels) const;
    [[noreturn]] void give_up(const std::vector<Shortfall>& missing) const;

    const GgufInfo& gguf_;
    const ModelOptions& options_;
    const PlacementPolicy& policy_;
    const Accelerators& accelerators_;
    const Measure& measure_;
    const std::vector<PlacementOverride> rules_;
    const std::vector<Capacity> capacities_;
    const std::uint64_t reserve_;  // bounded, so that sums stay in range
    std::vector<float> split_;
    std::vector<Layer> layers_;
};

void Search::weigh_layers() {
    layers_.resize(static_cast<std::size_t>(gguf_.layer_count));
    if (accelerators_.entries().empty()) {
        return;
    }
    auto* device = accelerators_.entries().front().device;  // padding differs little between devices
    const auto ruled = matched_tensors(gguf_, rules_);
    for (std::size_t i = 0; i < gguf_.tensors.size(); i++) {
        const auto& tensor = gguf_.tensors[i];
        if (tensor.layer < 0 || tensor.layer >= gguf_.layer_count - gguf_.nextn_layer_count || ruled[i]) {
            continue;  // of no layer that is loaded (a damaged header may name others), or placed by the user
        }
        auto& layer = layers_[static_cast<std::size_t>(tensor.layer)];
        const std::uint64_t bytes = allocated_bytes(tensor, device);
        if (tensor.role != TensorRole::experts) {
            layer.others += bytes;
            continue;
        }
        const bool down = tensor.name.find(".ffn_down_") != std::string::npos;
        layer.moved[1] += down ? bytes : 0;
        layer.moved[2] += down ? 0 : bytes;
        layer.moved[kAll] += bytes;
    }
}

// The layers that have something to move at this level, and do.
std::vector<int> Search::layers_at(int level, const std::vector<int>& levels) const {
    std::vector<int> layers;
    for (int i = 0; i < gguf_.layer_count; i++) {
        const auto layer = static_cast<std::size_t>(i);
        if (levels[layer] == level && layers_[layer].moved[static_cast<std::size_t>(level)] > 0) {
            layers.push_back(i);
        }
    }
    return layers;
}

Search::Trial Search::attempt(const std::vector<int>& levels) const {
    auto overrides = rules_;
    for (int level = 1; level <= kAll; level++) {
        const auto layers = layers_at(level, levels);
        if (!layers.empty()) {
            overrides.push_back({expert_pattern(kMoved[static_cast<std::size_t>(level)], layers), "CPU"});
        }
    }
    Trial trial;
    trial.placement = place_tensors(gguf_, options_, accelerators_, std::move(overrides), split_);
    trial.rows = measure_(trial.placement);
    trial.missing = shortfalls(trial.rows, capacities_, policy_.reserve);
    return trial;
}

std::vector<int> Search::layers_on(const std::string& device) const {
    const LayerDevices devices(gguf_, options_, accelerators_, split_);
    std::vector<int> layers;
    for (int i = 0; i < gguf_.layer_count; i++) {
        if (devices.layer(i) == device) {
            layers.push_back(i);
        }
    }
    return layers;
}

// Keeps as much as `room` bytes allow of these layers' experts, from the last layer on; the first that does not fit whole is kept in part.
// Returns the bytes kept.
std::uint64_t Search::keep(const std::vector<int>& layers, std::uint64_t room, std::vector<int>& levels) const {
    std::uint64_t kept = 0;
    bool whole = true;
    for (auto i = layers.rbegin(); i != layers.rend(); ++i) {
        const auto layer = static_cast<std::size_t>(*i);
        int level = whole ? 0 : kAll;
        const auto bytes = [&] { return layers_[layer].moved[kAll] - layers_[layer].moved[static_cast<std::size_t>(level)]; };
        while (level < kAll && kept + bytes() > room) {
            level++;
            whole = false;
        }
        kept += bytes();
        levels[layer] = level;
    }
    return kept;
}

// With several accelerators: shifts layers between them while that lets more experts stay on them. llama.cpp splits layers by free memory,
// which takes neither the rounding to whole layers nor what a device holds besides layers into account.
void Search::balance(const Trial& all_moved) {
    const LayerDevices devices(gguf_, options_, accelerators_, split_);
    const auto& entries = accelerators_.entries();
    std::vector<int> counts;
    int layers = 0;
    for (const auto& entry : entries) {
        counts.push_back(static_cast<int>(layers_on(entry.name).size()) + (devices.output() == entry.name ? 1 : 0));
        layers += counts.back();
    }
    std::uint64_t cache = 0;
    std::uint64_t first_layers = 0;
    for (const auto& entry : entries) {
        cache += bytes_of(all_moved.rows, entry.name, "kv_cache");
        first_layers += layers_on(entry.name).size();
    }
    const std::uint64_t layer_cache = first_layers > 0 ? cache / first_layers : 0;
    std::vector<std::uint64_t> fixed;  // what does not go with the layers: compute buffers, overhead, the output
    for (const auto& entry : entries) {
        std::uint64_t bytes = bytes_of(all_moved.rows, entry.name) - bytes_of(all_moved.rows, entry.name, "kv_cache");
        for (const int layer : layers_on(entry.name)) {
            bytes -= std::min(bytes, layers_[static_cast<std::size_t>(layer)].others);
        }
        fixed.push_back(bytes + reserve_);
    }
    // Bytes missing, and bytes of experts kept.
    const auto judge = [&](const std::vector<int>& candidate) {
        split_.assign(candidate.begin(), candidate.end());
        std::uint64_t missing = 0;
        std::uint64_t kept = 0;
        std::vector<int> levels(layers_.size(), kAll);
        for (std::size_t i = 0; i < entries.size(); i++) {
            std::uint64_t needed = fixed[i];
            const auto own = layers_on(entries[i].name);
            for (const int layer : own) {
                needed += layers_[static_cast<std::size_t>(layer)].others + layer_cache;
            }
            missing += needed > capacities_[i].bytes ? needed - capacities_[i].bytes : 0;
            kept += needed < capacities_[i].bytes ? keep(own, capacities_[i].bytes - needed, levels) : 0;
        }
        return std::make_pair(missing, UINT64_MAX - kept);  // the less the better, both
    };
    auto best = counts;
    auto best_score = judge(best);
    for (bool better = true; better;) {
        better = false;
        const auto from_here = best;
        for (std::size_t from = 0; from < counts.size(); from++) {
            for (std::size_t to = 0; to < counts.size(); to++) {
                auto candidate = from_here;
                if (from == to || candidate[from] == 0) {
                    continue;
                }
                candidate[from]--;
                candidate[to]++;
                const auto score = judge(candidate);
                if (score < best_score) {
                    best = candidate;
                    best_score = score;
                    better = true;
                }
            }
        }
    }
    split_ = best == counts ? default_split(accelerators_) : std::vector<float>(best.begin(), best.end());
}

std::vector<int> Search::estimate(const Trial& all_moved, const Trial& none_moved) const {
    std::vector<int> levels(layers_.size(), kAll);
    for (std::size_t i = 0; i < accelerators_.entries().size(); i++) {
        const auto& device = accelerators_.entries()[i].name;
        const std::uint64_t compute = bytes_of(all_moved.rows, device, "compute");
        const std::uint64_t needed = bytes_of(all_moved.rows, device) - compute + reserve_ +
                                     std::max(compute, bytes_of(none_moved.rows, device, "compute"));
        keep(layers_on(device), capacities_[i].bytes > needed ? capacities_[i].bytes - needed : 0, levels);
    }
    return levels;
}

bool Search::move_more(const std::string& device, std::vector<int>& levels) const {
    for (const int i : layers_on(device)) {  // the first of which some is kept
        auto& level = levels[static_cast<std::size_t>(i)];
        if (level < kAll && layers_[static_cast<std::size_t>(i)].moved[kAll] > 0) {
            level++;
            return true;
        }
    }
    return false;
}

bool Search::move_less(const std::string& device, std::vector<int>& levels) const {
    const auto layers = layers_on(device);
    for (auto i = layers.rbegin(); i != layers.rend(); ++i) {  // the last of which some is moved
        auto& level = levels[static_cast<std::size_t>(*i)];
        if (level > 0 && layers_[static_cast<std::size_t>(*i)].moved[kAll] > 0) {
            level--;
            return true;
        }
    }
    return false;
}

ResolvedPlacement Search::finished(Trial trial, const std::vector<int>& levels) const {
    if (!trial.missing.empty()) {  // of the host: the accelerators hold what they can
        give_up(trial.missing);
    }
    std::string moved;
    for (int level = kAll; level > 0; level--) {
        const auto layers = layers_at(level, levels);
        if (!layers.empty()) {
            const char* what = level == kAll ? "experts" : level == 1 ? "down projections of the experts" : "up and gate projections of the experts";
            moved += (moved.empty() ? std::string() : ", ") + what + " of layers " + range_list(layers);
        }
    }
    trial.placement.summary = moved.empty() ? "fit: all experts stay with their layers" : "fit: in host memory are the " + moved;
    return std::move(trial.placement);
}

void Search::give_up(const std::vector<Shortfall>& missing) const {
    const char* best = gguf_.expert_count == 0        ? ": "
                       : any_accelerator(missing) ? " even with all experts in host memory: "
                                                  : " even with as many experts on accelerators as there is room for: ";
    throw DoesNotFitError("'" + gguf_.path + "' does not fit" + best + describe(missing), missing);
}

ResolvedPlacement Search::run() {
    std::vector<int> levels(layers_.size(), 0);
    const std::vector<int> all(layers_.size(), kAll);
    auto best = attempt(levels);
    if (!any_accelerator(best.missing)) {
        return finished(std::move(best), levels);
    }
    auto all_moved = attempt(all);
    if (accelerators_.entries().size() > 1) {
        const auto before = split_;
        balance(all_moved);
        if (split_ != before) {
            all_moved = attempt(all);
        }
    }
    if (any_accelerator(all_moved.missing)) {
        give_up(all_moved.missing);
    }
    levels = estimate(all_moved, best);
    best = attempt(levels);
    for (int steps = 0; any_accelerator(best.missing) && steps < kMaxSteps; steps++) {
        bool moved = false;
        for (const auto& shortfall : best.missing) {
            moved = move_more(shortfall.device, levels) || moved;
        }
        if (!moved) {
            break;
        }
        best = attempt(levels);
    }
    if (any_accelerator(best.missing)) {
        levels = all;
        best = std::move(all_moved);
    }
    // The estimate is on the safe side: its compute buffers are those of the worst case.
    int steps = 0;
    for (const auto& entry : accelerators_.entries()) {
        for (bool fits = true; fits && steps < kMaxSteps; steps++) {
            auto fewer = levels;
            fits = move_less(entry.name, fewer);
            if (!fits) {
                break;
            }
            auto trial = attempt(fewer);
            fits = !any_accelerator(trial.missing);
            if (fits) {
                levels = fewer;
                best = std::move(trial);
            }
        }
    }
    return finished(std::move(best), levels);
}

}  // namespace

std::vector<Capacity> capacities(const Accelerators& accelerators, const PlacementPolicy& policy) {
    std::vector<Capacity> result;
    for (const auto& entry : accelerators.entries()) {
        result.push_back({entry.name, std::min(policy.vram.value_or(UINT64_MAX), entry.free), entry.shares_host});
    }
    result.push_back({"CPU", policy.ram.value_or(available_ram()), true});
    return result;
}

std::vector<Shortfall> shortfalls(const std::vector<MemoryRow>& rows, const std::vector<Capacity>& capacities, std::uint64_t reserve) {
    std::vector<Shortfall> missing;
    for (const auto& capacity : capacities) {
        const bool host = capacity.device == "CPU";
        std::uint64_t used = 0;
        for (const auto& other : capacities) {
            used += other.device == capacity.device || (host && other.shares_host) ? bytes_of(rows, other.device) : 0;
        }
        const std::uint64_t needed = used + (host || used == 0 ? 0 : std::min(reserve, UINT64_MAX - used));
        if (needed > capacity.bytes) {
            missing.push_back({capacity.device, needed, capacity.bytes});
        }
    }
    return missing;
}

std::string describe(const std::vector<Shortfall>& missing) {
    std::string text;
    for (const auto& shortfall : missing) {
        text += (text.empty() ? "" : "; ") + shortfall.device + " needs " + size_text(shortfall.needed) + " and has " + size_text(shortfall.capacity) + " (" +
                size_text(shortfall.missing()) + " short)";
    }
    return text;
}

ResolvedPlacement fit_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                const Accelerators& accelerators, const Measure& measure) {
    return Search(gguf, options, policy, accelerators, measure).run();
}

ResolvedPlacement fit_placement(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy,
                                const std::shared_ptr<const Accelerators>& accelerators, const std::atomic<bool>& cancelled) {
    const auto with = [&](const ModelOptions& changed, const PlacementPolicy& changed_policy) {
        return fit_placement(gguf, changed, changed_policy, *accelerators, [&](const ResolvedPlacement& placement) {
            if (cancelled.load()) {
                throw CancelledError("planning for '" + gguf.path + "' was cancelled");
            }
            try {
                return dry_run(gguf, changed, placement, accelerators);
            } catch (const NoDecoderError&) {  // nobody can make an engine of it, so there is nothing besides weights to leave room for
                return count_memory(gguf, placement.tensors, *accelerators);
            }
        });
    };
    try {
        return with(options, policy);
    } catch (const DoesNotFitError& error) {
        if (error.shortfalls.empty()) {  // a dry run failed for lack of memory here, which says nothing of other options
            throw;
        }
        const auto changes = changes_that_fit(gguf, options, policy, error.shortfalls, with);
        std::string advice;
        for (const auto& change : changes) {
            advice += (advice.empty() ? "; it would with " : ", or with ") + change;
        }
        throw DoesNotFitError(error.what() + advice, error.shortfalls, changes);
    }
}

}  // namespace llama_moe
