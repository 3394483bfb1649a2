#pragma once

#include <memory>

#include "ggml-cpp.h"
#include "llama_moe/expert_backend.h"

namespace llama_moe {

// Threads that compute graphs on the CPU: a pool of ggml's. Without one ggml makes a pool for each part of a graph, of which a token has
// hundreds; where it is built with OpenMP that takes only memory, elsewhere its threads are started and ended each time.
class CpuThreads {
   public:
    explicit CpuThreads(int threads);

    ggml_threadpool* pool() const { return pool_.get(); }
    // Of the CPU; has the pool while it is used.
    ggml_backend_t backend() const { return backend_.get(); }

    // While one exists in a thread, our expert backend computes there with the pool's threads too. Then these sleep, out of the way of others.
    class Use {
       public:
        explicit Use(const CpuThreads& threads);
        ~Use();
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;

       private:
        const CpuThreads& threads_;
        experts::ThreadsScope scope_;
    };

   private:
    std::unique_ptr<ggml_threadpool, void (*)(ggml_threadpool*)> pool_;
    ggml_backend_ptr backend_;
};

}  // namespace llama_moe
