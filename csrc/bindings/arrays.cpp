#include <cstring>

#include "bindings.h"
#include "llama_moe/error.h"

namespace llama_moe::bindings {

std::vector<std::int32_t> to_integers(const py::object& values, const char* name) {
    if (py::isinstance<py::list>(values)) {  // the common case, without numpy
        try {
            return values.cast<std::vector<std::int32_t>>();
        } catch (const py::cast_error&) {
            throw InvalidOptionError(std::string(name) + " holds something else than 32-bit integers");
        }
    }
    const auto array = py::array::ensure(values);
    if (!array) {
        PyErr_Clear();
        throw InvalidOptionError(std::string(name) + " is not an array of integers");
    }
    const char kind = array.dtype().kind();
    if (array.ndim() != 1 || (array.size() > 0 && kind != 'i' && kind != 'u')) {
        throw InvalidOptionError(std::string(name) + " has " + std::to_string(array.ndim()) + " dimensions and dtype " +
                                 py::str(array.dtype()).cast<std::string>() + "; it must be one-dimensional and of integers");
    }
    const auto wide = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
    std::vector<std::int32_t> result;
    result.reserve(static_cast<std::size_t>(wide.size()));
    for (py::ssize_t i = 0; i < wide.size(); i++) {
        const std::int64_t value = wide.at(i);
        if (value < INT32_MIN || value > INT32_MAX) {
            throw InvalidOptionError(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(value) + "; it must fit 32 bits");
        }
        result.push_back(static_cast<std::int32_t>(value));
    }
    return result;
}

py::bytes to_bytes(const std::string& data) {
    auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(data.size())));
    if (!bytes) {
        throw py::error_already_set();
    }
    char* target = PyBytes_AS_STRING(bytes.ptr());
    without_gil([&] { std::memcpy(target, data.data(), data.size()); });
    return bytes;
}

}  // namespace llama_moe::bindings
