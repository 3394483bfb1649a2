#include "ggml_threads.h"

#include <map>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "ggml-cpp.h"
#include "llama_moe/expert_backend.h"

namespace llama_moe::experts {
namespace {

using Work = std::function<void(int thread, int threads)>;

thread_local ggml_backend_t backend_with_threads = nullptr;

// A graph with one operation: some work, on each of the threads that compute it. There is no other way to ggml's threads.
class Call {
   public:
    explicit Call(int threads) : context_(ggml_init({ggml_tensor_overhead() + ggml_graph_overhead_custom(1, false), nullptr, /*no_alloc=*/true})) {
        const auto call = [](ggml_tensor*, int thread, int all, void* self) { (*static_cast<Call*>(self)->work_)(thread, all); };
        graph_ = ggml_new_graph_custom(context_.get(), 1, false);
        ggml_build_forward_expand(graph_, ggml_custom_4d(context_.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, call, threads, this));
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    void run(ggml_backend_t backend, const Work& work) {
        work_ = &work;
        ggml_backend_graph_compute(backend, graph_);
    }

   private:
    const ggml_context_ptr context_;
    ggml_cgraph* graph_;
    const Work* work_ = nullptr;
};

void run_on_new_threads(int threads, const Work& work) {
    std::vector<std::thread> others;
    int thread = 1;
    try {
        for (; thread < threads; thread++) {
            others.emplace_back([&work, thread, threads] { work(thread, threads); });
        }
    } catch (const std::system_error&) {
        // The system has no more: the rest is done here.
    }
    work(0, threads);
    for (; thread < threads; thread++) {
        work(thread, threads);
    }
    for (auto& other : others) {
        other.join();
    }
}

}  // namespace

ThreadsScope::ThreadsScope(ggml_backend_t cpu) : before_(std::exchange(backend_with_threads, cpu)) {}

ThreadsScope::~ThreadsScope() {
    backend_with_threads = before_;
}

void run_on_ggml_threads(int threads, const Work& work) {
    if (backend_with_threads == nullptr) {
        run_on_new_threads(threads, work);
        return;
    }
    thread_local std::map<int, std::unique_ptr<Call>> calls;
    auto& call = calls[threads];
    if (!call) {
        call = std::make_unique<Call>(threads);
    }
    call->run(backend_with_threads, work);
}

}  // namespace llama_moe::experts
