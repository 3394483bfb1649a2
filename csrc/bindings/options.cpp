#include "bindings.h"
#include "llama_moe/placement.h"

namespace llama_moe::bindings {

void bind_options(py::module_& m) {
    py::class_<ContextOptions>(m, "ContextOptions")
        .def(py::init<>())
        .def_readwrite("context_size", &ContextOptions::context_size)
        .def_readwrite("max_sequences", &ContextOptions::max_sequences)
        .def_readwrite("batch_size", &ContextOptions::batch_size)
        .def_readwrite("micro_batch_size", &ContextOptions::micro_batch_size)
        .def_readwrite("threads", &ContextOptions::threads)
        .def_readwrite("threads_batch", &ContextOptions::threads_batch)
        .def_readwrite("kv_type", &ContextOptions::kv_type)
        .def_readwrite("flash_attention", &ContextOptions::flash_attention)
        .def_readwrite("offload_kv", &ContextOptions::offload_kv)
        .def("validate", &ContextOptions::validate);

    py::class_<EngineOptions, ContextOptions>(m, "EngineOptions")
        .def(py::init<>())
        .def_readwrite("context_pool", &EngineOptions::context_pool)
        .def_readwrite("max_queue", &EngineOptions::max_queue)
        .def_readwrite("draft_tokens", &EngineOptions::draft_tokens)
        .def_readwrite("draft_ngram", &EngineOptions::draft_ngram)
        .def_readwrite("draft_min_probability", &EngineOptions::draft_min_probability)
        .def("validate", &EngineOptions::validate);

    py::class_<DeviceSpec>(m, "DeviceSpec")
        .def(py::init([](std::string name, std::uint64_t memory, std::uint64_t overhead) {
                 return DeviceSpec{std::move(name), memory, overhead};
             }),
             py::arg("name"), py::arg("memory"), py::arg("overhead"));

    py::class_<LoraOptions>(m, "LoraOptions")
        .def(py::init([](std::string path, float scale) { return LoraOptions{std::move(path), scale}; }), py::arg("path"), py::arg("scale"))
        .def_readonly("path", &LoraOptions::path)
        .def_readonly("scale", &LoraOptions::scale);

    py::class_<ModelOptions>(m, "ModelOptions")
        .def(py::init<>())
        .def_readwrite("devices", &ModelOptions::devices)
        .def_readwrite("hypothetical_devices", &ModelOptions::hypothetical_devices)
        .def_readwrite("gpu_layers", &ModelOptions::gpu_layers)
        .def_readwrite("host_memory", &ModelOptions::host_memory)
        .def_readwrite("repack", &ModelOptions::repack)
        .def_readwrite("expert_kernels", &ModelOptions::expert_kernels)
        .def_readwrite("check_tensors", &ModelOptions::check_tensors)
        .def_readwrite("lora", &ModelOptions::lora)
        .def_readwrite("fit_for", &ModelOptions::fit_for);
}

}  // namespace llama_moe::bindings
