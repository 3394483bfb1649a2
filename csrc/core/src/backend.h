#pragma once

#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpp.h"

namespace llama_moe {

// Names a device for people and for placements: "CPU" for host memory in every form, else ggml's name.
std::string device_name(ggml_backend_dev_t device);
// Where a buffer type's memory is. A GPU's pinned host buffer is host memory.
std::string buffer_device(ggml_backend_buffer_type_t type);
bool is_host_buffer(ggml_backend_buffer_type_t type);

bool is_accelerator(ggml_backend_dev_t device);
// Of an RPC worker.
bool is_remote(ggml_backend_dev_t device);
std::vector<ggml_backend_dev_t> remote_devices();
// Those llama.cpp would use by default, in its order: RPC workers, GPUs, integrated GPUs when there is no other GPU.
std::vector<ggml_backend_dev_t> default_accelerators();

// Finds a device by name, by an RPC worker's endpoint, or "cpu", in any case; nullptr when there is none.
ggml_backend_dev_t find_device(const std::string& name);
ggml_backend_dev_t cpu_device();
// Computes on a device, with so many threads if that is a matter of threads.
ggml_backend_ptr make_backend(ggml_backend_dev_t device, int threads);
// All device names, for error messages: "CPU, RPC0 (127.0.0.1:50052)".
std::string known_devices();

}  // namespace llama_moe
