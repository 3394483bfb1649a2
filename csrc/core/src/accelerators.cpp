#include "accelerators.h"

#include <algorithm>

#include "backend.h"
#include "failed_devices.h"
#include "llama.h"
#include "llama_moe/error.h"
#include "machine.h"

namespace llama_moe {

std::vector<ggml_backend_dev_t> chosen_accelerators(const ModelOptions& options) {
    if (!options.devices) {
        return options.hypothetical_devices.empty() ? default_accelerators() : std::vector<ggml_backend_dev_t>();
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

Accelerators::Accelerators(const ModelOptions& options) {
    for (auto* device : chosen_accelerators(options)) {
        std::size_t free = 0;
        std::size_t total = 0;
        ggml_backend_dev_memory(device, &free, &total);
        const bool shares_host = total == 0 || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_IGPU;
        const std::uint64_t usable = total == 0 ? available_ram() : free;
        entries_.push_back({device, device_name(device), usable, 0, shares_host});
    }
    for (const auto& spec : options.hypothetical_devices) {
        if (spec.name.empty() || spec.name == "CPU" || find(spec.name) != nullptr) {
            throw PlacementError("a hypothetical device is named '" + spec.name + "'; give each a name of its own");
        }
        hypothetical_.push_back(std::make_unique<HypotheticalDevice>(spec.name, spec.memory));
        entries_.push_back({hypothetical_.back()->get(), spec.name, spec.memory, spec.overhead, false});
    }
    if (entries_.size() > llama_max_devices()) {
        throw PlacementError(std::to_string(entries_.size()) + " devices; llama.cpp uses at most " + std::to_string(llama_max_devices()));
    }
}

ggml_backend_dev_t Accelerators::find(const std::string& name) const {
    const auto named = std::find_if(entries_.begin(), entries_.end(), [&](const auto& entry) { return entry.name == name; });
    if (named != entries_.end()) {
        return named->device;
    }
    auto* device = find_device(name);  // by any of its names
    const bool used = device == cpu_device() || std::any_of(entries_.begin(), entries_.end(), [&](const auto& e) { return e.device == device; });
    return used ? device : nullptr;
}

bool Accelerators::offer_pinned_memory() const {
    return std::any_of(entries_.begin(), entries_.end(), [](const auto& entry) {
        return is_hypothetical(entry.device) || ggml_backend_dev_host_buffer_type(entry.device) != nullptr;
    });
}

}  // namespace llama_moe
