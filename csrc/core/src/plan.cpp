#include "llama_moe/plan.h"

#include <atomic>
#include <map>

#include "accelerators.h"
#include "dry_run.h"
#include "fit.h"
#include "host_memory.h"
#include "llama_moe/device.h"
#include "machine.h"
#include "native_thread.h"
#include "placement_rules.h"

namespace llama_moe {
namespace {

Plan plan_for(const GgufInfo& gguf, const ModelOptions& options, const PlacementPolicy& policy, const std::atomic<bool>& cancelled) {
    options.fit_for.validate();
    const auto accelerators = std::make_shared<const Accelerators>(options);
    Plan plan;
    plan.placement = resolve_placement(gguf, options, policy, accelerators, cancelled);
    check_host_memory(options, plan.placement, *accelerators, *policy.ram);
    plan.rows = dry_run(gguf, options, plan.placement, accelerators);
    const auto limits = capacities(*accelerators, policy);
    for (const auto& capacity : limits) {
        plan.capacities.emplace_back(capacity.device, capacity.bytes);
    }
    plan.shortfalls = shortfalls(plan.rows, limits, policy.kind == PlacementPolicy::Kind::fit ? policy.reserve : 0);
    std::map<std::string, int> layers;
    for (const auto& tensor : gguf.tensors) {
        layers[tensor.name] = tensor.layer;
    }
    for (const auto& tensor : plan.placement.tensors) {
        plan.tensor_layers.push_back(layers.at(tensor.name));
    }
    const LayerDevices devices(gguf, options, *accelerators, plan.placement.tensor_split);
    for (int i = 0; i <= gguf.layer_count; i++) {
        plan.layer_devices.push_back(devices.layer(i));
    }
    return plan;
}

}  // namespace

Plan make_plan(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy, std::optional<std::uint64_t> ram,
               const Poll& poll) {
    start_backend();
    struct Result {
        Plan plan;
        std::atomic<bool> cancelled{false};
    };
    auto result = std::make_shared<Result>();
    auto with_ram = policy;
    with_ram.ram = policy.ram.value_or(ram.value_or(available_ram()));
    // On a thread of its own: asking a remote device can block.
    run_native([=] { result->plan = plan_for(read_gguf(path), options, with_ram, result->cancelled); }, poll,
               [result] { result->cancelled.store(true); }, chosen_accelerators(options));
    return result->plan;
}

}  // namespace llama_moe
