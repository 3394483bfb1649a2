#include "failed_devices.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <mutex>
#include <set>

#include "backend.h"
#include "llama_moe/error.h"
#include "tcp.h"

namespace llama_moe {
namespace {

constexpr std::chrono::seconds kProbeTimeout{1};

struct FailedDevices {
    std::mutex mutex;
    std::set<ggml_backend_dev_t> devices;
};

// Never destroyed: threads that are left behind may outlive static destruction.
FailedDevices& failed_devices() {
    static auto* failed = new FailedDevices;
    return *failed;
}

bool listens(ggml_backend_dev_t device) {
    try {
        check_listening(parse_endpoint(ggml_backend_dev_description(device)), kProbeTimeout, {});
        return true;
    } catch (const Error&) {
        return false;
    }
}

}  // namespace

bool any_failed(const std::vector<ggml_backend_dev_t>& devices) {
    auto& failed = failed_devices();
    std::lock_guard<std::mutex> lock(failed.mutex);
    return std::any_of(devices.begin(), devices.end(), [&](auto* device) { return failed.devices.count(device) > 0; });
}

bool is_remote_failure(const std::string& abort_message) {
    return abort_message.find("ggml-rpc") != std::string::npos;
}

bool find_failed(const std::vector<ggml_backend_dev_t>& devices) {
    auto& failed = failed_devices();
    std::lock_guard<std::mutex> lock(failed.mutex);
    // ggml does not say which worker it was: one that no longer listens.
    bool found = false;
    for (std::size_t i = 0; i < ggml_backend_dev_count(); i++) {
        auto* device = ggml_backend_dev_get(i);
        if (is_remote(device) && (failed.devices.count(device) > 0 || !listens(device))) {
            failed.devices.insert(device);
            found = true;
        }
    }
    if (!found) {  // each listens, so one was started again, or gave a wrong answer
        std::copy_if(devices.begin(), devices.end(), std::inserter(failed.devices, failed.devices.end()),
                     [](auto* device) { return device != nullptr && is_remote(device); });
    }
    return std::any_of(devices.begin(), devices.end(), [&](auto* device) { return failed.devices.count(device) > 0; });
}

}  // namespace llama_moe
