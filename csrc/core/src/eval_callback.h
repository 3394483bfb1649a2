#pragma once

#include "llama.h"

namespace llama_moe {

// Has `callback` asked about every node of the graphs that the context computes from now on; null: none any more. llama.cpp takes a
// callback only when a context is made, and with one it computes differently even while nothing is wanted: it waits for the device
// after each part of a graph, and devices cannot see that a graph is the one they had before. So there is one only while it is needed.
// Between two calls of llama_decode, on a context that is not computing.
void set_eval_callback(llama_context* context, ggml_backend_sched_eval_callback callback, void* data);

// Reserves the compute buffers of a context now, if what they depend on changed since it was made, and not in its next decode. Throws
// std::exception when there is no memory for them.
void reserve_compute_buffers(llama_context* context);

}  // namespace llama_moe
