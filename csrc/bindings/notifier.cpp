#include "llama_moe/notifier.h"

#include "bindings.h"

namespace llama_moe::bindings {

void bind_notifier(py::module_& m) {
    py::class_<NotifierHandle>(m, "Notifier")
        .def(py::init([] { return std::make_unique<NotifierHandle>(std::make_shared<Notifier>()); }))
        .def("fileno", [](const NotifierHandle& notifier) { return without_gil([&] { return notifier->file_descriptor(); }); })
        .def("take", [](const NotifierHandle& notifier) { return without_gil([&] { return notifier->take(); }); })
        .def("close", [](const NotifierHandle& notifier) { without_gil([&] { notifier->close(); }); });
}

}  // namespace llama_moe::bindings
