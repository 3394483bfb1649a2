#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "fusion.h"
#include "multiplication.h"

namespace llama_moe::experts {

// Computes graphs of this backend's operations. One thread at a time uses it.
class Computation {
   public:
    void set_threads(int threads) { threads_ = threads; }
    // Asked now and then by the thread that computes; true ends a graph.
    void set_stop(std::function<bool()> should_stop) { multiplication_.set_stop(std::move(should_stop)); }
    // False: stopped before the end.
    bool compute(const ggml_cgraph& graph);

   private:
    bool compute(ggml_tensor* node);
    bool compute(const GatedProduct& block);
    bool compute(const WeightedSum& block);
    bool multiply(const ggml_tensor* product);
    void multiply_plain(const ggml_tensor* weights, const ggml_tensor* activations);

    void assign(const ggml_tensor* product, const ggml_tensor* output);
    void round_activations(const ggml_tensor* product);
    template <class Work>
    void for_each_row(const ggml_tensor* tensor, Work work) const;

    int threads_ = 1;
    const KernelSet& kernels_ = usable_kernels().front();
    Multiplication multiplication_{kernels_};
    std::vector<Assignment> assignments_;
    std::vector<float> router_weights_;
};

}  // namespace llama_moe::experts
