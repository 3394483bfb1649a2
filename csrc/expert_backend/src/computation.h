#pragma once

#include <cstdint>
#include <vector>

#include "fusion.h"
#include "multiplication.h"

namespace llama_moe::experts {

// Computes graphs of this backend's operations. One thread at a time uses it.
class Computation {
   public:
    void set_threads(int threads) { threads_ = threads; }
    void compute(const ggml_cgraph& graph);

   private:
    void compute(ggml_tensor* node);
    void compute(const GatedProduct& block);
    void compute(const WeightedSum& block);
    void multiply(const ggml_tensor* product);
    void multiply_plain(const ggml_tensor* weights, const ggml_tensor* activations);

    void assign(const ggml_tensor* product, const ggml_tensor* output);
    void round_activations(const ggml_tensor* product);
    template <class Work>
    void for_each_row(const ggml_tensor* tensor, Work work) const;

    int threads_ = 1;
    Multiplication multiplication_{usable_kernels().front()};
    std::vector<Assignment> assignments_;
    std::vector<float> router_weights_;
};

}  // namespace llama_moe::experts
