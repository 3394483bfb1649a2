#pragma once

#include <atomic>
#include <map>
#include <string>
#include <vector>

#include "ggml.h"
#include "llama_moe/imatrix.h"

namespace llama_moe {

// Sums the squares of the inputs of matrix products, out of llama.cpp's graphs while they are computed. Of the thread that computes, but
// for layer(), which any thread may ask.
class ImatrixCollector {
   public:
    explicit ImatrixCollector(bool output) : output_(output) {}

    // As ggml_backend_sched_eval_callback: asked about each node whether it is wanted, called again when a wanted one was computed.
    bool on_node(const ggml_tensor* node, bool ask);

    int layer() const { return layer_.load(std::memory_order_relaxed); }  // the last one that was seen
    const std::string& error() const { return error_; }                   // what stopped the sums; empty: nothing
    std::map<std::string, Imatrix::Entry> entries() const;

   private:
    struct Sums {
        std::vector<double> values;
        std::vector<double> counts;
    };

    bool wants(const ggml_tensor* node) const;
    void add_dense(const ggml_tensor* node, const char* inputs);
    void add_experts(const ggml_tensor* node, const char* inputs);
    Sums& sums_of(const ggml_tensor* weights, std::size_t values, std::size_t counts);

    const bool output_;
    std::map<std::string, Sums> sums_;
    std::vector<char> copied_;  // what lies on a device
    std::vector<char> ids_;
    std::string error_;
    std::atomic<int> layer_{0};
};

}  // namespace llama_moe
