#include "failed_devices.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>

#include "backend.h"
#include "llama_moe/error.h"
#include "native_thread.h"
#include "tcp.h"

namespace llama_moe {
namespace {

struct Workers {
    std::mutex mutex;
    std::map<ggml_backend_dev_t, std::string> failed;  // and why
    std::map<ggml_backend_dev_t, std::chrono::milliseconds> answer_limits;
};

// Never destroyed: threads that are left behind may outlive static destruction.
Workers& workers() {
    static auto* all = new Workers;
    return *all;
}

constexpr std::chrono::seconds kProbeTimeout{1};

Endpoint endpoint_of(ggml_backend_dev_t device) {
    return parse_endpoint(ggml_backend_dev_description(device));
}

bool listens(ggml_backend_dev_t device) {
    try {
        check_listening(endpoint_of(device), kProbeTimeout, {});
        return true;
    } catch (const Error&) {
        return false;
    }
}

std::vector<ggml_backend_dev_t> remote_among(const std::vector<ggml_backend_dev_t>& devices) {
    std::vector<ggml_backend_dev_t> remote;
    std::copy_if(devices.begin(), devices.end(), std::back_inserter(remote),
                 [](auto* device) { return device != nullptr && is_remote(device); });
    return remote;
}

std::string label(ggml_backend_dev_t device) {
    return "device '" + device_name(device) + "' (" + ggml_backend_dev_description(device) + ")";
}

}  // namespace

bool any_failed(const std::vector<ggml_backend_dev_t>& devices) {
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    return std::any_of(devices.begin(), devices.end(), [&](auto* device) { return all.failed.count(device) > 0; });
}

bool any_remote(const std::vector<ggml_backend_dev_t>& devices) {
    return !remote_among(devices).empty();
}

std::string describe_failed(const std::vector<ggml_backend_dev_t>& devices) {
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    std::string text;
    for (auto* device : devices) {
        const auto failure = all.failed.find(device);
        if (failure != all.failed.end()) {
            text += (text.empty() ? "" : "; ") + label(device) + " failed: " + failure->second;
        }
    }
    return text;
}

std::string not_answered(const std::vector<ggml_backend_dev_t>& devices) {
    std::string text;
    for (auto* device : remote_among(devices)) {
        text += (text.empty() ? "" : ", or ") + label(device);
    }
    return text + " has not answered for " + std::to_string(kCloseLimit.count()) + " s";
}

Poll within_close_limit(const std::vector<ggml_backend_dev_t>& devices) {
    if (!any_remote(devices)) {
        return {};
    }
    const auto deadline = std::chrono::steady_clock::now() + kCloseLimit;
    return [devices, deadline] {
        if (std::chrono::steady_clock::now() > deadline) {
            throw DecodeError(not_answered(devices));
        }
    };
}

bool is_remote_failure(const std::string& abort_message) {
    return abort_message.find("ggml-rpc") != std::string::npos;
}

std::vector<ggml_backend_dev_t> find_failed(const std::vector<ggml_backend_dev_t>& devices, const std::string& abort_message) {
    const auto own = remote_among(devices);
    std::vector<ggml_backend_dev_t> unclear;
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    // ggml does not say which worker it was: none that this process still has a connection to, for a broken one is not replaced.
    bool found = false;
    for (std::size_t i = 0; i < ggml_backend_dev_count(); i++) {
        auto* device = ggml_backend_dev_get(i);
        if (!is_remote(device) || (all.failed.count(device) == 0 && connected(endpoint_of(device)))) {
            continue;
        }
        found = true;
        if (all.failed.count(device) == 0 && !listens(device)) {
            all.failed.emplace(device, "its worker ended, or the connection to it broke");
        } else if (all.failed.count(device) == 0 && std::find(own.begin(), own.end(), device) != own.end()) {
            unclear.push_back(device);  // idle, or started again since
        }
    }
    if (!found) {  // one that is connected gave a wrong answer
        for (auto* device : own) {
            all.failed.emplace(device, abort_message);
        }
    }
    return unclear;
}

void set_answer_limit(ggml_backend_dev_t device, std::chrono::milliseconds limit) {
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    all.answer_limits[device] = limit;
}

std::chrono::milliseconds answer_limit(const std::vector<ggml_backend_dev_t>& devices) {
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    std::chrono::milliseconds shortest = std::chrono::hours(1'000'000);  // what the clock can add
    for (auto* device : devices) {
        const auto limit = all.answer_limits.find(device);
        if (limit != all.answer_limits.end()) {
            shortest = std::min(shortest, limit->second);
        }
    }
    return shortest;
}

struct Ping::State {
    std::mutex mutex;
    std::set<ggml_backend_dev_t> missing;
};

Ping::Ping(const std::vector<ggml_backend_dev_t>& devices) : state_(std::make_shared<State>()) {
    const auto remote = remote_among(devices);
    state_->missing.insert(remote.begin(), remote.end());
    for (auto* device : remote) {
        std::thread([state = state_, device] {
            const NativeScope scope;
            try {
                std::size_t free = 0;
                std::size_t total = 0;
                ggml_backend_dev_memory(device, &free, &total);
            } catch (const NativeAbort&) {
                return;
            }
            std::lock_guard<std::mutex> lock(state->mutex);
            state->missing.erase(device);
        }).detach();
    }
}

std::vector<ggml_backend_dev_t> Ping::missing() const {
    std::lock_guard<std::mutex> lock(state_->mutex);
    return {state_->missing.begin(), state_->missing.end()};
}

void Ping::fail_missing(std::chrono::milliseconds waited) const {
    std::ostringstream reason;
    reason << "its worker has not answered for " << static_cast<double>(waited.count()) / 1000 << " s";
    const auto devices = missing();
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    for (auto* device : devices) {
        all.failed.emplace(device, reason.str());
    }
}

}  // namespace llama_moe
