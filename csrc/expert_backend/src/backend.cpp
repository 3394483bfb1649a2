#include "llama_moe/expert_backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "computation.h"
#include "ggml-backend-impl.h"
#include "kernels.h"

namespace llama_moe::experts {
namespace {

constexpr const char* kName = "Experts";

thread_local int scopes = 0;
thread_local const Observer* observer = nullptr;

ggml_guid_t backend_guid() {
    static ggml_guid guid = {0x6c, 0x6c, 0x61, 0x6d, 0x61, 0x5f, 0x6d, 0x6f, 0x65, 0x2d, 0x65, 0x78, 0x70, 0x65, 0x72, 0x74};
    return &guid;
}

void set_threads(ggml_backend_t backend, int threads) {
    static_cast<Computation*>(backend->context)->set_threads(std::max(1, threads));
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data) {
    static_cast<Computation*>(backend->context)->set_stop(callback ? std::function<bool()>([=] { return callback(data); }) : nullptr);
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char*) {
    ggml_backend_i functions{};
    functions.get_name = [](ggml_backend_t) { return kName; };
    functions.free = [](ggml_backend_t backend) {
        delete static_cast<Computation*>(backend->context);
        delete backend;
    };
    functions.graph_compute = [](ggml_backend_t backend, ggml_cgraph* graph) {
        return static_cast<Computation*>(backend->context)->compute(*graph) ? GGML_STATUS_SUCCESS : GGML_STATUS_ABORTED;
    };
    return new ggml_backend{backend_guid(), functions, device, new Computation()};
}

void get_properties(ggml_backend_dev_t device, ggml_backend_dev_props* properties) {
    *properties = {};
    properties->name = ggml_backend_dev_name(device);
    properties->description = ggml_backend_dev_description(device);
    properties->type = ggml_backend_dev_type(device);
    // llama.cpp lets several GPUs work on micro-batches side by side if all devices of a context can; this one would not be in their way.
    properties->caps.async = true;
    properties->caps.events = true;
}

ggml_backend_device* make_device() {
    ggml_backend_device_i functions{};
    functions.get_name = [](ggml_backend_dev_t) { return kName; };
    functions.get_description = [](ggml_backend_dev_t) { return "packed weights in host memory"; };
    functions.get_memory = [](ggml_backend_dev_t, std::size_t* free, std::size_t* total) { *free = *total = 0; };
    functions.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; };
    functions.get_props = get_properties;
    functions.init_backend = init_backend;
    // Results belong into ordinary memory, where ggml's CPU backend reads them without a copy. A load is asked to use the device for weights
    // by another answer; with this one it leaves the device out.
    functions.get_buffer_type = [](ggml_backend_dev_t) { return scopes > 0 ? expert_buffer_type() : ggml_backend_cpu_buffer_type(); };
    functions.supports_op = [](ggml_backend_dev_t, const ggml_tensor* op) { return computes(op); };
    // Activations are read where they are.
    functions.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
        return type == expert_buffer_type() || ggml_backend_buft_is_host(type);
    };
    return new ggml_backend_device{functions, expert_registry(), nullptr};
}

}  // namespace

ggml_backend_reg_t expert_registry() {
    static auto* made = [] {
        ggml_backend_reg_i functions{};
        functions.get_name = [](ggml_backend_reg_t) { return kName; };
        functions.get_device_count = [](ggml_backend_reg_t) -> std::size_t { return 1; };
        functions.get_device = [](ggml_backend_reg_t, std::size_t) { return expert_device(); };
        functions.get_proc_address = [](ggml_backend_reg_t, const char* name) -> void* {
            if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
                return reinterpret_cast<void*>(set_threads);
            }
            return std::strcmp(name, "ggml_backend_set_abort_callback") == 0 ? reinterpret_cast<void*>(set_abort_callback) : nullptr;
        };
        return new ggml_backend_reg{GGML_BACKEND_API_VERSION, functions, nullptr};
    }();
    return made;
}

ggml_backend_dev_t expert_device() {
    static auto* device = make_device();
    return device;
}

std::string kernel_name() {
    return usable_kernels().front().name;
}

KernelsScope::KernelsScope() {
    scopes++;
}

KernelsScope::~KernelsScope() {
    scopes--;
}

Observer::Observer(See see) : see_(std::move(see)), before_(std::exchange(observer, this)) {}

Observer::~Observer() {
    observer = before_;
}

void Observer::show(const ggml_tensor* op) {
    if (observer) {
        observer->see_(op);
    }
}

}  // namespace llama_moe::experts
