#include <cstring>

#include "bindings.h"
#include "llama_moe/error.h"

namespace llama_moe::bindings {
namespace {

// A message may quote text that was cut within a character.
py::object text_of(const char* message) {
    PyObject* text = PyUnicode_DecodeUTF8(message, static_cast<Py_ssize_t>(std::strlen(message)), "replace");
    if (text == nullptr) {
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(text);
}

void raise(const char* module, const char* name, const char* message) {
    const py::object type = py::module_::import(module).attr(name);
    PyErr_SetObject(type.ptr(), text_of(message).ptr());
}

// With the numbers as attributes.
void raise(const DoesNotFitError& error) {
    const py::object type = py::module_::import("llama_moe.errors").attr("DoesNotFitError");
    py::dict missing;
    for (const auto& shortfall : error.shortfalls) {
        missing[py::str(shortfall.device)] = shortfall.missing();
    }
    const py::object raised = type(text_of(error.what()), py::arg("shortfall") = missing, py::arg("changes") = py::cast(error.changes));
    PyErr_SetObject(type.ptr(), raised.ptr());
}

constexpr const char* kErrors = "llama_moe.errors";

}  // namespace

void bind_errors(py::module_& /*m*/) {
    py::register_local_exception_translator([](std::exception_ptr error) {
        try {
            std::rethrow_exception(error);
        } catch (const ModelLoadError& e) {
            raise(kErrors, "ModelLoadError", e.what());
        } catch (const PlacementError& e) {
            raise(kErrors, "PlacementError", e.what());
        } catch (const DoesNotFitError& e) {
            raise(e);
        } catch (const ContextFullError& e) {
            raise(kErrors, "ContextFullError", e.what());
        } catch (const DecodeError& e) {
            raise(kErrors, "DecodeError", e.what());
        } catch (const QueueFullError& e) {
            raise(kErrors, "QueueFullError", e.what());
        } catch (const ClosedError& e) {
            raise(kErrors, "ClosedError", e.what());
        } catch (const CancelledError& e) {
            raise(kErrors, "CancelledError", e.what());
        } catch (const TimeoutError& e) {
            raise(kErrors, "RequestTimeoutError", e.what());
        } catch (const InvalidOptionError& e) {
            raise(kErrors, "InvalidOptionError", e.what());
        } catch (const FileNotFoundError& e) {
            raise("builtins", "FileNotFoundError", e.what());
        } catch (const QuantizeError& e) {
            raise(kErrors, "QuantizeError", e.what());
        } catch (const FileError& e) {
            PyErr_SetObject(PyExc_OSError, py::make_tuple(e.code(), text_of(e.what())).ptr());
        } catch (const Error& e) {
            raise(kErrors, "LlamaMoeError", e.what());
        }
    });
}

}  // namespace llama_moe::bindings
