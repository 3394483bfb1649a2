#include "worker_graphs.h"

#include <map>
#include <mutex>
#include <set>

#include "backend.h"
#include "ggml-backend-impl.h"  // a device's and a backend's functions
#include "ggml-impl.h"          // a graph's identity; this is the only file of the core that includes it

namespace llama_moe {
namespace {

struct Uses {
    int models = 0;
    int contexts = 0;
};

struct Workers {
    std::mutex mutex;
    std::map<std::string, Uses> uses;  // by endpoint: a worker forgets the graphs of all its devices together
    decltype(ggml_backend_device_i::init_backend) init_backend = nullptr;
    decltype(ggml_backend_i::graph_compute) graph_compute = nullptr;
};

// Never destroyed: threads that are left behind may outlive static destruction.
Workers& workers() {
    static auto* all = new Workers;
    return *all;
}

// Only puts a message into the client's queue, so nobody waits long for the lock.
ggml_status compute(ggml_backend_t backend, ggml_cgraph* graph) {
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    const Uses& uses = all.uses[ggml_backend_dev_description(ggml_backend_get_device(backend))];
    const auto identity = graph->uid;
    if (uses.models > 1 || uses.contexts > 1) {
        graph->uid = 0;  // like no graph before it
    }
    const auto status = all.graph_compute(backend, graph);
    graph->uid = identity;
    return status;
}

ggml_backend_t start(ggml_backend_dev_t device, const char* parameters) {
    auto& all = workers();
    ggml_backend_t backend = all.init_backend(device, parameters);
    if (backend != nullptr) {
        std::lock_guard<std::mutex> lock(all.mutex);
        all.graph_compute = backend->iface.graph_compute;
        backend->iface.graph_compute = compute;
    }
    return backend;
}

}  // namespace

void guard_graphs(ggml_backend_dev_t device) {
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    if (device->iface.init_backend != start) {
        if (all.init_backend == nullptr) {
            all.init_backend = device->iface.init_backend;  // one function for all workers
        }
        device->iface.init_backend = start;
    }
}

WorkerUse::WorkerUse(const std::vector<ggml_backend_dev_t>& devices, Kind kind) : kind_(kind) {
    std::set<std::string> endpoints;
    for (auto* device : devices) {
        if (device != nullptr && is_remote(device)) {
            endpoints.insert(ggml_backend_dev_description(device));
        }
    }
    endpoints_.assign(endpoints.begin(), endpoints.end());
    add(1);
}

WorkerUse::~WorkerUse() {
    add(-1);
}

void WorkerUse::add(int sign) const {
    auto& all = workers();
    std::lock_guard<std::mutex> lock(all.mutex);
    for (const auto& endpoint : endpoints_) {
        auto& uses = all.uses[endpoint];
        uses.models += kind_ == Kind::context ? 0 : sign;
        uses.contexts += kind_ == Kind::model ? 0 : sign;
    }
}

}  // namespace llama_moe
