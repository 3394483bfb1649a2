#include "bindings.h"
#include "llama_moe/log.h"

namespace llama_moe::bindings {
namespace {

// Never destroyed: there is no interpreter left when static objects are. The GIL guards it.
py::object& sink() {
    static auto* object = new py::object;
    return *object;
}

}  // namespace

void drain_logs() {
    if (!has_log() || !sink()) {
        return;
    }
    // An exception that is on its way to the caller must survive the call of the sink.
    py::error_scope pending;
    std::vector<std::pair<int, std::string>> lines;
    for (auto& line : take_log()) {
        lines.emplace_back(line.level, std::move(line.text));
    }
    try {
        // A log line may hold bytes of a broken file.
        py::list batch;
        for (const auto& [level, text] : lines) {
            batch.append(py::make_tuple(level, py::reinterpret_steal<py::str>(
                                                   PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"))));
        }
        sink()(batch);
    } catch (py::error_already_set& error) {
        // The sink is Python code, in which a signal can be noticed: that is no failure of the sink, and the caller has to hear of it.
        if (error.matches(PyExc_KeyboardInterrupt)) {
            PyErr_SetInterrupt();
        } else {
            error.discard_as_unraisable("llama_moe's log sink");
        }
    }
}

void bind_logging(py::module_& m) {
    m.def("set_log_sink", [](const py::typing::Callable<void(py::typing::List<py::typing::Tuple<int, py::str>>)>& function) { sink() = function; }, py::arg("sink"));
    m.def("set_log_level", &set_log_level, py::arg("level"));
    m.def("drain_logs", &drain_logs);
}

}  // namespace llama_moe::bindings
