#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "llama_moe/chat.h"
#include "llama_moe/context.h"
#include "llama_moe/engine.h"
#include "llama_moe/memory.h"
#include "llama_moe/model.h"
#include "llama_moe/notifier.h"
#include "llama_moe/process.h"
#include "llama_moe/routing.h"
#include "llama_moe/wait.h"

namespace py = pybind11;

namespace llama_moe::bindings {

void bind_errors(py::module_& m);
void bind_logging(py::module_& m);
void bind_devices(py::module_& m);
void bind_gguf(py::module_& m);
void bind_options(py::module_& m);
void bind_placement(py::module_& m);
void bind_plan(py::module_& m);
void bind_model(py::module_& m);
void bind_routing(py::module_& m);
void bind_context(py::module_& m);
void bind_sampling(py::module_& m);
void bind_notifier(py::module_& m);
void bind_engine(py::module_& m);
void bind_chat(py::module_& m);
void bind_quantize(py::module_& m);
void bind_bandwidth(py::module_& m);

// Hands queued log lines to the sink. Needs the GIL.
void drain_logs();

// For waits in the core: takes the GIL, lets pending signals run (Ctrl-C throws), hands over log lines.
Poll poll_signals();

// The GIL, given back and held for a scope: pybind11's classes for that let a thread die that is still running when the interpreter
// ends. Before 3.14, Python unwinds the stack of a thread that asks for the GIL then, and whatever must not throw aborts the process. A
// thread that meets this here sleeps until the process is gone, which is what newer Pythons do.
template <typename Take>
void take_gil(Take&& take) {
    try {
        take();
    } catch (...) {
        while (true) {
            std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }
}

class GilReleased {
   public:
    GilReleased() : state_(PyEval_SaveThread()) {}
    ~GilReleased() {
        take_gil([this] { PyEval_RestoreThread(state_); });
    }
    GilReleased(const GilReleased&) = delete;
    GilReleased& operator=(const GilReleased&) = delete;

   private:
    PyThreadState* state_;
};

class GilHeld {
   public:
    GilHeld() {
        take_gil([this] { state_ = PyGILState_Ensure(); });
    }
    ~GilHeld() { PyGILState_Release(state_); }
    GilHeld(const GilHeld&) = delete;
    GilHeld& operator=(const GilHeld&) = delete;

   private:
    PyGILState_STATE state_{};
};

// Runs `work` without the GIL: the only way bindings call what may wait or take longer than a microsecond. Python objects
// must not be touched inside.
template <typename Work>
auto without_gil(Work&& work) {
    struct Drain {
        ~Drain() { drain_logs(); }
    } drain;  // after the GIL is back, whether or not `work` threw
    const GilReleased released;
    return work();
}

// Owns a core object whose destructor may wait for native threads: gives the GIL back meanwhile. In a forked child those threads
// do not exist, and what they used is left as it is.
template <typename T>
class Handle {
   public:
    explicit Handle(std::shared_ptr<T> native) : native_(std::move(native)) {}
    ~Handle() {
        if (forked()) {
            new std::shared_ptr<T>(std::move(native_));
            return;
        }
        const GilReleased released;
        native_.reset();
    }
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    T& operator*() const { return *native_; }
    T* operator->() const { return native_.get(); }
    const std::shared_ptr<T>& get() const { return native_; }

   private:
    std::shared_ptr<T> native_;
};

using ModelHandle = Handle<Model>;
using ContextHandle = Handle<Context>;
using EngineHandle = Handle<Engine>;
using GenerationHandle = Handle<Generation>;
using NotifierHandle = Handle<Notifier>;
using RoutingTraceHandle = Handle<RoutingTrace>;
using ChatTemplateHandle = Handle<ChatTemplate>;

using MemoryTuples = std::vector<std::tuple<std::string, std::string, std::uint64_t>>;
MemoryTuples to_tuples(const std::vector<MemoryRow>& rows);
// (buffer type, device, "model" | "context" | "compute", bytes)
using BreakdownTuples = std::vector<std::tuple<std::string, std::string, std::string, std::uint64_t>>;
BreakdownTuples to_tuples(const std::vector<BreakdownRow>& rows);

// Adds the start and the end of a trace to an engine or a context.
template <typename HandleType>
void def_tracing(py::class_<HandleType>& traced) {
    traced
        .def(
            "start_trace",
            [](const HandleType& handle, bool choices, bool weights) {
                return std::make_unique<RoutingTraceHandle>(without_gil([&] { return handle->start_trace({choices, weights}); }));
            },
            py::arg("choices"), py::arg("weights"))
        .def(
            "end_trace", [](const HandleType& handle, const RoutingTraceHandle& trace) { without_gil([&] { handle->end_trace(trace.get()); }); },
            py::arg("trace"));
}

// Saved states may be gigabytes: they are copied without the GIL.
py::bytes to_bytes(const std::string& data);

// A one-dimensional array or sequence of integers; anything else is an InvalidOptionError that names it.
std::vector<std::int32_t> to_integers(const py::object& values, const char* name);

}  // namespace llama_moe::bindings
