#include "routing_reader.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "eval_callback.h"
#include "ggml-backend.h"
#include "llama_moe/expert_backend.h"
#include "llama_moe/log.h"

namespace llama_moe {
namespace {

// The number behind `label` in a tensor's name; -1: it has none. llama.cpp names what is of a layer "<label>-<layer>", and a copy for
// another device "<device>#<name>#<copy>".
int layer_in(const ggml_tensor* tensor, const char* label) {
    const char* found = tensor == nullptr ? nullptr : std::strstr(tensor->name, label);
    if (found == nullptr) {
        return -1;
    }
    const char* number = std::strrchr(found, '-');
    char* end = nullptr;
    const long layer = number == nullptr ? -1 : std::strtol(number + 1, &end, 10);
    return end == number + 1 ? -1 : static_cast<int>(layer);
}

// The elements of a matrix on any device, [rows, columns]; the chosen experts are a view of the first columns of all, sorted.
template <typename T>
std::vector<T> read_matrix(const ggml_tensor* tensor, std::size_t columns, std::size_t rows, std::size_t column_bytes, std::size_t row_bytes) {
    std::vector<T> values(columns * rows);
    if (values.empty()) {
        return values;
    }
    std::vector<char> bytes(ggml_nbytes(tensor));
    ggml_backend_tensor_get(tensor, bytes.data(), 0, bytes.size());
    for (std::size_t row = 0; row < rows; row++) {
        for (std::size_t column = 0; column < columns; column++) {
            std::memcpy(&values[row * columns + column], bytes.data() + row * row_bytes + column * column_bytes, sizeof(T));
        }
    }
    return values;
}

}  // namespace

RoutingReader::RoutingReader(llama_context* context, std::shared_ptr<RoutingHub> hub, bool unified)
    : context_(context), hub_(std::move(hub)), unified_(unified) {}

bool RoutingReader::begin() {
    traces_ = hub_->active();
    micro_batches_.clear();
    first_node_.clear();
    wants_choices_ = wants_weights_ = false;
    for (const auto& trace : traces_) {
        wants_choices_ |= trace->options().choices;
        wants_weights_ |= trace->options().weights;
    }
    if (installed_ != !traces_.empty()) {
        installed_ = !installed_;
        const auto callback = [](ggml_tensor* node, bool ask, void* reader) { return static_cast<RoutingReader*>(reader)->on_node(node, ask); };
        set_eval_callback(context_, installed_ ? static_cast<ggml_backend_sched_eval_callback>(callback) : nullptr, this);
    }
    return installed_;
}

// Asked about each node: whether it is wanted. Called again when a wanted one was computed; false would end the graph.
bool RoutingReader::on_node(const ggml_tensor* node, bool ask) {
    if (node->op == GGML_OP_GET_ROWS && ask) {
        if (std::strstr(node->src[1]->name, "inp_tokens") != nullptr && (first_node_.empty() || first_node_ == node->name)) {
            first_node_ = node->name;
            begin_micro_batch(node->src[1]);
        }
        return false;
    }
    if (ask) {
        return !experts::computes(node) && tells_more(node);
    }
    read(node);
    return true;
}

void RoutingReader::see(const ggml_tensor* op) {
    if (tells_more(op)) {
        read(op);
    }
}

// Whether a node has choices or weights among its operands, the first one of its layer: that may have further experts, chosen in the same way.
bool RoutingReader::tells_more(const ggml_tensor* node) {
    const bool product = node->op == GGML_OP_MUL_MAT_ID;
    const bool weighted = wants_weights_ && node->op == GGML_OP_MUL && std::strncmp(node->name, "ffn_moe_weighted-", 17) == 0;
    Layer* layer = product || weighted ? layer_of(node) : nullptr;
    return layer != nullptr && !std::exchange(product ? layer->chosen : layer->weighted, true);
}

void RoutingReader::read(const ggml_tensor* node) {
    Layer& layer = *layer_of(node);
    node->op == GGML_OP_MUL_MAT_ID ? read_choices(node->src[2], layer) : read_weights(node->src[1], layer);
}

RoutingReader::Layer* RoutingReader::layer_of(const ggml_tensor* node) {
    int number = node->op == GGML_OP_MUL_MAT_ID ? layer_in(node->src[2], "ffn_moe_topk-") : -1;
    number = number < 0 ? layer_in(node, "ffn_moe_") : number;
    const auto& layers = hub_->shape().moe_layers;
    const auto found = std::lower_bound(layers.begin(), layers.end(), number);
    if (micro_batches_.empty() || found == layers.end() || *found != number) {
        return nullptr;
    }
    return &micro_batches_.back().layers[static_cast<std::size_t>(found - layers.begin())];
}

void RoutingReader::begin_micro_batch(const ggml_tensor* tokens) {
    micro_batches_.emplace_back();
    micro_batches_.back().tokens = read_matrix<std::int32_t>(tokens, static_cast<std::size_t>(tokens->ne[0]), 1, tokens->nb[0], tokens->nb[1]);
    micro_batches_.back().layers.resize(hub_->shape().moe_layers.size());
}

void RoutingReader::read_choices(const ggml_tensor* ids, Layer& layer) const {
    const auto used = static_cast<std::size_t>(hub_->shape().used);
    const auto columns = std::min(used, static_cast<std::size_t>(ids->ne[0]));
    layer.rows = static_cast<std::size_t>(ids->ne[1]);
    const auto values = read_matrix<std::int32_t>(ids, columns, layer.rows, ids->nb[0], ids->nb[1]);
    layer.choices.assign(layer.rows * used, kNoExpert);
    for (std::size_t i = 0; i < values.size(); i++) {
        if (values[i] >= 0 && values[i] < hub_->shape().experts) {
            layer.choices[i / columns * used + i % columns] = static_cast<std::uint16_t>(values[i]);
        }
    }
}

void RoutingReader::read_weights(const ggml_tensor* weights, Layer& layer) const {
    const auto used = static_cast<std::size_t>(hub_->shape().used);
    const auto columns = std::min(used, static_cast<std::size_t>(weights->ne[1]));
    const auto rows = static_cast<std::size_t>(weights->ne[2]);
    const auto values = read_matrix<float>(weights, columns, rows, weights->nb[1], weights->nb[2]);
    layer.weights.assign(rows * used, std::numeric_limits<float>::quiet_NaN());
    for (std::size_t i = 0; i < values.size(); i++) {
        layer.weights[i / columns * used + i % columns] = values[i];
    }
}

void RoutingReader::count(const MicroBatch& micro_batch, RoutedTokens& routed) const {
    const auto& shape = hub_->shape();
    for (std::size_t i = 0; i < micro_batch.layers.size(); i++) {
        auto* counts = routed.counts.data() + static_cast<std::size_t>(shape.moe_layers[i]) * static_cast<std::size_t>(shape.experts);
        for (const auto expert : micro_batch.layers[i].choices) {
            if (expert != kNoExpert) {
                counts[expert]++;
            }
        }
    }
}

// Writes what each layer chose to the tokens it chose it for. A layer has all of a micro-batch, or those whose logits are wanted.
void RoutingReader::place(const MicroBatch& micro_batch, const std::vector<int>& outputs, RoutedTokens& routed) const {
    const auto used = static_cast<std::size_t>(hub_->shape().used);
    const std::size_t layers = micro_batch.layers.size();
    const std::size_t tokens = micro_batch.tokens.size();
    const std::size_t first = routed.tokens.size() - tokens;
    if (wants_choices_) {
        routed.choices.resize(routed.tokens.size() * layers * used, kNoExpert);
    }
    if (wants_weights_) {
        routed.weights.resize(routed.tokens.size() * layers * used, std::numeric_limits<float>::quiet_NaN());
    }
    for (std::size_t i = 0; i < layers; i++) {
        const auto& layer = micro_batch.layers[i];
        const bool all = layer.rows == tokens;
        if (!all && layer.rows != outputs.size()) {
            continue;
        }
        for (std::size_t row = 0; row < layer.rows; row++) {
            const std::size_t token = first + (all ? row : static_cast<std::size_t>(outputs[row]));
            const std::size_t to = (token * layers + i) * used;
            const auto copy = [&](const auto& from, auto& into) {
                if (!from.empty()) {
                    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(row * used), used, into.begin() + static_cast<std::ptrdiff_t>(to));
                }
            };
            if (wants_choices_) {
                copy(layer.choices, routed.choices);
            }
            if (wants_weights_ && layer.weights.size() == layer.rows * used) {
                copy(layer.weights, routed.weights);
            }
        }
    }
}

void RoutingReader::end(const std::vector<BatchRow>& batch, bool computed) {
    if (!computed) {
        return;
    }
    if (micro_batches_.empty()) {
        log_line(LogLevel::warning, "the routing of a batch could not be traced: its graph looks up no tokens");
        return;
    }
    const auto& shape = hub_->shape();
    RoutedTokens routed;
    routed.counts.resize(static_cast<std::size_t>(shape.layers) * static_cast<std::size_t>(shape.experts));
    MicroBatches cut(batch, unified_);
    for (const auto& micro_batch : micro_batches_) {
        count(micro_batch, routed);
        const auto rows = cut.take(micro_batch.tokens);
        std::vector<int> outputs;
        for (std::size_t i = 0; i < rows.size(); i++) {
            const auto& known = rows[i] < 0 ? BatchRow{{micro_batch.tokens[i], -1, -1, -1}, false} : batch[static_cast<std::size_t>(rows[i])];
            routed.tokens.push_back(known.token);
            if (known.output) {
                outputs.push_back(static_cast<int>(i));
            }
        }
        place(micro_batch, outputs, routed);
    }
    for (const auto& trace : traces_) {
        trace->add(routed);
    }
    traces_.clear();
}

}  // namespace llama_moe
