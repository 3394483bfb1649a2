#include "llama_moe/device.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <mutex>
#include <set>
#include <sstream>

#include "backend.h"
#include "backend_libraries.h"
#include "failed_devices.h"
#include "llama.h"
#include "log.h"
#include "llama_moe/error.h"
#include "llama_moe/expert_backend.h"
#include "llama_moe/log.h"
#include "llama_moe/process.h"
#include "native_thread.h"
#include "tcp.h"
#include "worker_graphs.h"

namespace llama_moe {
namespace {

// Functions of ggml-rpc.h.
using AddServer = ggml_backend_reg_t (*)(const char* endpoint);
using StartServer = void (*)(const char* endpoint, const char* cache_dir, std::size_t threads, std::size_t count, ggml_backend_dev_t* devices);

constexpr std::chrono::seconds kConnectTimeout{5};
constexpr std::chrono::seconds kHandshakeTimeout{10};

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text;
}

std::string backend_name(ggml_backend_dev_t device) {
    return ggml_backend_reg_name(ggml_backend_dev_backend_reg(device));
}

const char* kind_name(enum ggml_backend_dev_type type) {
    switch (type) {
        case GGML_BACKEND_DEVICE_TYPE_CPU: return "cpu";
        case GGML_BACKEND_DEVICE_TYPE_GPU: return "gpu";
        case GGML_BACKEND_DEVICE_TYPE_IGPU: return "integrated_gpu";
        default: return "accelerator";
    }
}

Device describe(ggml_backend_dev_t device) {
    Device result;
    result.name = device_name(device);
    result.description = ggml_backend_dev_description(device);
    result.kind = kind_name(ggml_backend_dev_type(device));
    result.backend = backend_name(device);
    std::size_t free = 0;
    std::size_t total = 0;
    if (!any_failed({device})) {
        ggml_backend_dev_memory(device, &free, &total);
    }
    result.memory_free = free;
    result.memory_total = total;
    return result;
}

std::vector<ggml_backend_dev_t> all_devices() {
    std::vector<ggml_backend_dev_t> result;
    for (std::size_t i = 0; i < ggml_backend_dev_count(); i++) {
        if (ggml_backend_dev_get(i) != experts::expert_device()) {  // the CPU, by another name
            result.push_back(ggml_backend_dev_get(i));
        }
    }
    return result;
}

std::function<void()>& plugin_loader() {
    static auto* loader = new std::function<void()>;
    return *loader;
}

}  // namespace

void start_backend() {
    belong_to_this_process();
    require_same_process("llama.cpp");
    static std::once_flag once;
    std::call_once(once, [] {
        capture_native_log();
        common_log_set_verbosity_thold(-1);  // the `common` library's own log prints; below zero it is silent
        install_abort_handler();
        load_own_backends();
        llama_backend_init();
    });
    static std::once_flag plugins;
    thread_local bool loading = false;  // the loader may log, and whoever takes the line may come here again
    if (loading || !plugin_loader()) {
        return;
    }
    std::call_once(plugins, [] {
        loading = true;
        struct End {
            ~End() { loading = false; }
        } end;
        plugin_loader()();
    });
}

void set_plugin_loader(std::function<void()> loader) {
    plugin_loader() = std::move(loader);
}

std::string device_name(ggml_backend_dev_t device) {
    return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU ? "CPU" : ggml_backend_dev_name(device);
}

bool is_host_buffer(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    // The CPU's own buffer type has no device, and its repacked ones and ours are not "host" in ggml's sense of plain layout.
    return device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU || device == experts::expert_device() ||
           ggml_backend_buft_is_host(type);
}

std::string buffer_device(ggml_backend_buffer_type_t type) {
    return is_host_buffer(type) ? "CPU" : device_name(ggml_backend_buft_get_device(type));
}

bool is_accelerator(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

bool is_remote(ggml_backend_dev_t device) {
    return backend_name(device) == "RPC";
}

std::vector<ggml_backend_dev_t> remote_devices() {
    auto devices = all_devices();
    devices.erase(std::remove_if(devices.begin(), devices.end(), [](auto* device) { return !is_remote(device) || any_failed({device}); }),
                  devices.end());
    return devices;
}

std::vector<ggml_backend_dev_t> default_accelerators() {
    std::vector<ggml_backend_dev_t> remote;
    std::vector<ggml_backend_dev_t> gpus;
    std::vector<ggml_backend_dev_t> integrated;
    for (auto* device : all_devices()) {
        if (!is_accelerator(device) || any_failed({device})) {
            continue;
        }
        if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            integrated.push_back(device);
        } else {
            (is_remote(device) ? remote : gpus).push_back(device);
        }
    }
    if (gpus.empty()) {
        gpus = std::move(integrated);
    }
    remote.insert(remote.end(), gpus.begin(), gpus.end());
    return remote;
}

ggml_backend_dev_t cpu_device() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

ggml_backend_ptr make_backend(ggml_backend_dev_t device, int threads) {
    ggml_backend_ptr backend(ggml_backend_dev_init(device, nullptr));
    if (!backend) {
        throw Error("device '" + device_name(device) + "' could not be started");
    }
    auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"));
    if (set != nullptr) {
        set(backend.get(), threads);
    }
    return backend;
}

ggml_backend_dev_t find_device(const std::string& name) {
    const std::string wanted = lower(name);
    if (wanted == "cpu") {
        return cpu_device();
    }
    for (auto* device : all_devices()) {
        const bool by_endpoint = is_remote(device) && lower(ggml_backend_dev_description(device)) == wanted;
        if (lower(ggml_backend_dev_name(device)) == wanted || by_endpoint) {
            return device;
        }
    }
    return nullptr;
}

std::string known_devices() {
    std::string names;
    for (auto* device : all_devices()) {
        if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU && !is_accelerator(device)) {
            continue;
        }
        names += (names.empty() ? "" : ", ") + device_name(device);
        if (is_remote(device)) {
            names += " (" + std::string(ggml_backend_dev_description(device)) + ")";
        }
    }
    return names;
}

std::vector<Device> devices(const Poll& poll) {
    start_backend();
    auto result = std::make_shared<std::vector<Device>>();
    // On a thread of its own: asking an RPC worker for its memory can block.
    run_native(
        [result] {
            for (auto* device : all_devices()) {
                result->push_back(describe(device));
            }
        },
        poll, {}, remote_devices());
    return *result;
}

std::vector<Device> add_rpc_device(const std::string& endpoint, double answer_timeout, const Poll& poll) {
    start_backend();
    constexpr double kLongest = 1e9;  // seconds: what the clock can count without overflow
    if (!(answer_timeout > 0 && answer_timeout <= kLongest)) {
        std::ostringstream message;
        message << "answer_timeout is " << answer_timeout << "; it must be a number of seconds above 0, at most " << kLongest;
        throw InvalidOptionError(message.str());
    }
    const Endpoint address = parse_endpoint(endpoint);
    auto result = std::make_shared<std::vector<Device>>();

    static std::mutex mutex;
    static auto* registered = new std::set<std::string>;
    // ggml serialises these calls under a lock of its own, so one that hangs would block all later ones.
    static bool stuck = false;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (stuck) {
            throw Error("an earlier connection to an RPC worker never ended; restart the process to add devices");
        }
    }
    if (auto* device = find_device(endpoint); device != nullptr && any_failed({device})) {
        throw Error("the RPC worker at " + endpoint +
                    " failed earlier; this process cannot connect to the same address again: start the worker on another port");
    }
    // ggml would abort when nobody listens.
    check_listening(address, kConnectTimeout, poll);

    const auto deadline = std::chrono::steady_clock::now() + kHandshakeTimeout;
    const std::chrono::milliseconds limit(std::llround(answer_timeout * 1000));
    run_native(
        [endpoint, result, limit] {
            ggml_backend_reg_t reg = reinterpret_cast<AddServer>(backend_function("RPC", "ggml_backend_rpc_add_server"))(endpoint.c_str());
            if (reg == nullptr) {
                throw Error("the RPC worker at " + endpoint + " offers no device");
            }
            {
                std::lock_guard<std::mutex> lock(mutex);
                if (registered->insert(endpoint).second) {
                    ggml_backend_register(reg);
                }
            }
            for (std::size_t i = 0; i < ggml_backend_reg_dev_count(reg); i++) {
                guard_graphs(ggml_backend_reg_dev_get(reg, i));
                set_answer_limit(ggml_backend_reg_dev_get(reg, i), limit);
                result->push_back(describe(ggml_backend_reg_dev_get(reg, i)));
            }
        },
        [&] {
            if (std::chrono::steady_clock::now() > deadline) {
                std::lock_guard<std::mutex> lock(mutex);
                stuck = true;
                throw Error("no llama.cpp RPC worker answered at " + endpoint + " within 10 s");
            }
            if (poll) {
                poll();
            }
        });
    return *result;
}

void run_worker(const std::string& endpoint, int threads, const std::optional<std::string>& cache_dir) {
    start_backend();
    parse_endpoint(endpoint);
    if (threads < 0) {
        throw InvalidOptionError("threads is " + std::to_string(threads) + "; it must be 0 (one per core) or more");
    }
    std::vector<ggml_backend_dev_t> served = default_accelerators();
    if (served.empty()) {
        served.push_back(cpu_device());
    }
    const int count = threads == 0 ? usable_cores() : threads;
    const auto start_server = reinterpret_cast<StartServer>(backend_function("RPC", "ggml_backend_rpc_start_server"));
    start_server(endpoint.c_str(), cache_dir ? cache_dir->c_str() : nullptr, static_cast<std::size_t>(count), served.size(), served.data());
    throw Error("could not listen on " + endpoint + "; is the address in use?");
}

}  // namespace llama_moe
