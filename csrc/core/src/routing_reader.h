#pragma once

#include <memory>
#include <string>
#include <vector>

#include "llama.h"
#include "llama_moe/routing.h"
#include "micro_batches.h"

namespace llama_moe {

// Reads what the routers chose out of llama.cpp's graphs while they are computed, for the traces of a hub. Of the thread that computes.
//
// The chosen experts are an operand of the first product with the experts' weights in each layer, and the routers' weights, if they are
// wanted, one of where the experts' outputs are multiplied with them. Both are wherever that operation is computed, and whatever way the
// architecture came to them; fused routing kernels stay whole. The expert backend shows its operations as it computes them. At those of
// other backends a graph is stopped.
class RoutingReader {
   public:
    // `unified`: all sequences share the buffer of one KV cache.
    RoutingReader(llama_context* context, std::shared_ptr<RoutingHub> hub, bool unified);
    RoutingReader(const RoutingReader&) = delete;
    RoutingReader& operator=(const RoutingReader&) = delete;

    // Around each llama_decode. Traces that were started after begin() see the next one. What was not `computed` is not counted.
    bool begin();  // false: there are no traces, and end() need not be called
    void see(const ggml_tensor* op);  // one that the expert backend is about to compute
    void end(const std::vector<BatchRow>& batch, bool computed);

   private:
    struct Layer {
        bool chosen = false;  // its choices were read, or are about to be
        bool weighted = false;
        std::size_t rows = 0;
        std::vector<std::uint16_t> choices;  // [rows, used]
        std::vector<float> weights;
    };
    struct MicroBatch {
        std::vector<std::int32_t> tokens;
        std::vector<Layer> layers;  // of the model's layers with experts
    };

    bool on_node(const ggml_tensor* node, bool ask);
    bool tells_more(const ggml_tensor* node);
    void read(const ggml_tensor* node);
    Layer* layer_of(const ggml_tensor* node);
    void begin_micro_batch(const ggml_tensor* tokens);
    void read_choices(const ggml_tensor* ids, Layer& layer) const;
    void read_weights(const ggml_tensor* weights, Layer& layer) const;
    void count(const MicroBatch& micro_batch, RoutedTokens& routed) const;
    void place(const MicroBatch& micro_batch, const std::vector<int>& outputs, RoutedTokens& routed) const;

    llama_context* const context_;
    const std::shared_ptr<RoutingHub> hub_;
    const bool unified_;
    bool installed_ = false;

    std::vector<std::shared_ptr<RoutingTrace>> traces_;  // of the running call
    bool wants_choices_ = false;
    bool wants_weights_ = false;
    std::string first_node_;  // of a graph: the one that looks the tokens up
    std::vector<MicroBatch> micro_batches_;
};

}  // namespace llama_moe
