// The expert backend, and ggml's for comparison.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "llama_moe/expert_backend.h"

namespace test {

inline ggml_backend_ptr make_backend(bool ours, int threads) {
    ggml_backend_ptr backend(ours ? ggml_backend_dev_init(llama_moe::experts::expert_device(), nullptr) : ggml_backend_cpu_init());
    if (ours) {
        auto* registry = ggml_backend_dev_backend_reg(llama_moe::experts::expert_device());
        auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
        set(backend.get(), threads);
    } else {
        ggml_backend_cpu_set_n_threads(backend.get(), threads);
    }
    return backend;
}

}  // namespace test
