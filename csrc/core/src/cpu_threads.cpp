#include "cpu_threads.h"

#include "backend.h"
#include "backend_libraries.h"
#include "ggml-cpu.h"
#include "llama_moe/error.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

// With functions of the CPU backend, which may be in a library of its own.
void set_pool(ggml_backend_t backend, ggml_threadpool* pool) {
    static const auto set = reinterpret_cast<decltype(&ggml_backend_cpu_set_threadpool)>(backend_function("CPU", "ggml_backend_cpu_set_threadpool"));
    set(backend, pool);
}

}  // namespace

CpuThreads::CpuThreads(int threads)
    : pool_(nullptr, reinterpret_cast<decltype(&ggml_threadpool_free)>(backend_function("CPU", "ggml_threadpool_free"))),
      backend_(make_backend(cpu_device(), threads)) {
    auto params = ggml_threadpool_params_default(threads);
    params.paused = true;
    params.poll = 1;  // idle threads spin for some milliseconds, enough for what lies between parts of a graph, not for hundreds of them
    try {
        pool_.reset(reinterpret_cast<decltype(&ggml_threadpool_new)>(backend_function("CPU", "ggml_threadpool_new"))(&params));
    } catch (const NativeAbort& abort) {
        throw Error(std::to_string(threads) + " threads could not be started: " + abort.what());
    }
}

CpuThreads::Use::Use(const CpuThreads& threads) : threads_(threads), scope_(threads.backend()) {
    set_pool(threads_.backend(), threads_.pool());
}

CpuThreads::Use::~Use() {
    set_pool(threads_.backend(), nullptr);
}

}  // namespace llama_moe
