#include "bindings.h"
#include "llama_moe/live_objects.h"

namespace llama_moe::bindings {

Poll poll_signals() {
    return [] {
        const GilHeld held;
        if (PyErr_CheckSignals() != 0) {
            throw py::error_already_set();
        }
        drain_logs();
    };
}

MemoryTuples to_tuples(const std::vector<MemoryRow>& rows) {
    MemoryTuples tuples;
    for (const auto& row : rows) {
        tuples.emplace_back(row.device, row.role, row.bytes);
    }
    return tuples;
}

BreakdownTuples to_tuples(const std::vector<BreakdownRow>& rows) {
    BreakdownTuples tuples;
    for (const auto& row : rows) {
        tuples.emplace_back(row.buffer_type, row.device, row.kind, row.bytes);
    }
    return tuples;
}

}  // namespace llama_moe::bindings

PYBIND11_MODULE(_core, m) {
    using namespace llama_moe::bindings;
    m.doc() = "Native core of llama_moe. Private: use the classes of the package.";
    bind_errors(m);
    bind_logging(m);
    bind_devices(m);
    bind_gguf(m);
    bind_options(m);
    bind_placement(m);
    bind_plan(m);
    bind_model(m);
    bind_routing(m);
    bind_context(m);
    bind_sampling(m);
    bind_notifier(m);
    bind_engine(m);
    bind_chat(m);
    bind_quantize(m);
    bind_bandwidth(m);
    m.def("live_objects", [] {
        const auto& live = llama_moe::live_objects();
        return std::map<std::string, int>{{"models", live.models},
                                          {"contexts", live.contexts},
                                          {"engines", live.engines},
                                          {"generations", live.generations},
                                          {"notifiers", live.notifiers}};
    });
    m.def("forked", &llama_moe::forked);
}
