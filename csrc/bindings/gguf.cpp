#include "bindings.h"
#include "gguf_metadata.h"
#include "llama_moe/gguf_file.h"

namespace llama_moe::bindings {
namespace {

// GGUF strings are UTF-8 by definition, but a file may break that.
py::str to_text(const std::string& text) {
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
}

py::object to_python(const MetadataValue& value) {
    return std::visit(
        [](const auto& held) -> py::object {
            using T = std::decay_t<decltype(held)>;
            if constexpr (std::is_same_v<T, MetadataArray>) {
                py::list list;
                for (const auto& entry : held.values) {
                    list.append(to_python(entry));
                }
                return std::move(list);
            } else if constexpr (std::is_same_v<T, std::string>) {
                return to_text(held);
            } else {
                return py::cast(held);
            }
        },
        value);
}

}  // namespace

py::typing::Dict<py::str, py::object> to_python(const std::map<std::string, MetadataValue>& metadata) {
    py::typing::Dict<py::str, py::object> result;
    for (const auto& [key, value] : metadata) {
        result[to_text(key)] = to_python(value);
    }
    return result;
}

void bind_gguf(py::module_& m) {
    py::class_<TensorInfo>(m, "TensorInfo")
        .def_readonly("name", &TensorInfo::name)
        .def_readonly("type", &TensorInfo::type)
        .def_readonly("shape", &TensorInfo::shape)
        .def_readonly("bytes", &TensorInfo::bytes)
        .def_property_readonly("role", [](const TensorInfo& info) { return std::string(role_name(info.role)); })
        .def_readonly("layer", &TensorInfo::layer);
    py::class_<GgufInfo>(m, "GgufInfo")
        .def_readonly("path", &GgufInfo::path)
        .def_readonly("files", &GgufInfo::files)
        .def_readonly("architecture", &GgufInfo::architecture)
        .def_property_readonly("metadata", [](const GgufInfo& info) { return to_python(info.metadata); })
        .def_readonly("tensors", &GgufInfo::tensors)
        .def_readonly("layer_count", &GgufInfo::layer_count)
        .def_readonly("expert_count", &GgufInfo::expert_count)
        .def_readonly("experts_used", &GgufInfo::experts_used)
        .def_readonly("parameter_count", &GgufInfo::parameter_count)
        .def_readonly("size_bytes", &GgufInfo::size_bytes);
    m.def("read_gguf", [](const std::string& path) { return without_gil([&] { return read_gguf(path); }); }, py::arg("path"));
}

}  // namespace llama_moe::bindings
