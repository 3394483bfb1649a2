#pragma once

#include <string>
#include <vector>

#include "ggml-backend.h"

namespace llama_moe {

// llama.cpp's RPC client sends a worker a graph once and then only says "compute the last one again". It remembers which one was last
// without a lock, one memory for all contexts of the process, and never learns that the worker forgot it, which it does whenever
// anybody frees a buffer there. With two contexts on one worker a step could compute the other's graph, and closing one of them
// broke the connection of both (ggml-rpc.cpp: ggml_backend_rpc_graph_compute, rpc_server::free_buffer).
//
// Call once for each device of a worker, before anything is computed on it: graphs are then sent one at a time, and said to be the
// last one again only while a single context of a single model is there.
void guard_graphs(ggml_backend_dev_t device);

// What something in this process has on the workers of some devices. Made before its first buffer there, destroyed after its last.
class WorkerUse {
   public:
    enum class Kind { model, context, both };

    WorkerUse(const std::vector<ggml_backend_dev_t>& devices, Kind kind);
    ~WorkerUse();
    WorkerUse(const WorkerUse&) = delete;
    WorkerUse& operator=(const WorkerUse&) = delete;

   private:
    void add(int sign) const;

    std::vector<std::string> endpoints_;
    Kind kind_;
};

}  // namespace llama_moe
