#pragma once

#include <functional>

namespace llama_moe::experts {

// Calls work(thread, threads) on the calling thread, as 0, and on `threads` - 1 others; returns when all have. Within a ThreadsScope they are
// those of its backend, no more than it has, which begin at once; else they are made and ended here.
void run_on_ggml_threads(int threads, const std::function<void(int thread, int threads)>& work);

}  // namespace llama_moe::experts
