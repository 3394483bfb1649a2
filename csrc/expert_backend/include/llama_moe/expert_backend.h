#pragma once

#include <string>

#include "ggml-backend.h"

namespace llama_moe::experts {

// A ggml backend for weights in host memory: it keeps them packed for its own kernels and multiplies with them, experts above all.
// ggml's CPU backend does everything else. Once registered with ggml it is a device, of type ACCEL, of every context in the process; the
// loads whose weights it takes are those within a KernelsScope.
ggml_backend_reg_t expert_registry();

// Where the weights of such a load are. `ggml_backend_buft_name` says "Experts".
ggml_backend_buffer_type_t expert_buffer_type();
ggml_backend_dev_t expert_device();

// The kernels that this processor runs: "avx2" or "portable".
std::string kernel_name();

// While one exists in a thread, what that thread loads into host memory goes to this backend, as far as it has kernels for it.
class KernelsScope {
   public:
    KernelsScope();
    ~KernelsScope();
    KernelsScope(const KernelsScope&) = delete;
    KernelsScope& operator=(const KernelsScope&) = delete;
};

}  // namespace llama_moe::experts
