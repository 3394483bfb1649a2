#pragma once

#include <functional>
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

// The kernels that this processor runs: "avx2", "portable" or another (kernels.h).
std::string kernel_name();

// Whether this backend computes an operation of a graph.
bool computes(const ggml_tensor* op);

// While one exists in a thread, what that thread loads into host memory goes to this backend, as far as it has kernels for it.
class KernelsScope {
   public:
    KernelsScope();
    ~KernelsScope();
    KernelsScope(const KernelsScope&) = delete;
    KernelsScope& operator=(const KernelsScope&) = delete;
};

// While one exists in a thread, what this backend computes there has the threads of a CPU backend that does nothing else meanwhile: one that
// shares its pool of threads with the context's, or its threads and ours would compete for the processors. A build with OpenMP needs none.
class ThreadsScope {
   public:
    explicit ThreadsScope(ggml_backend_t cpu);
    ~ThreadsScope();
    ThreadsScope(const ThreadsScope&) = delete;
    ThreadsScope& operator=(const ThreadsScope&) = delete;

   private:
    const ggml_backend_t before_;
};

// While one exists in a thread, it is called with each operation that this backend computes in that thread, before it is computed: the
// experts that a product has (MUL_MAT_ID) and the router's weights (MUL) are among the operands then.
class Observer {
   public:
    using See = std::function<void(const ggml_tensor* op)>;

    explicit Observer(See see);
    ~Observer();
    Observer(const Observer&) = delete;
    Observer& operator=(const Observer&) = delete;

    // To the thread's observer, if there is one.
    static void show(const ggml_tensor* op);

   private:
    const See see_;
    const Observer* const before_;
};

}  // namespace llama_moe::experts
