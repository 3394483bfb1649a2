// Headers of models that no file has, for what is decided from a header alone.
#pragma once

#include <algorithm>
#include <string>

#include "llama_moe/gguf_file.h"

namespace test {

using namespace llama_moe;

constexpr std::uint64_t kMiB = 1ull << 20;

inline void add_tensor(GgufInfo& info, const std::string& name, std::uint64_t bytes, int layer = -1) {
    TensorInfo tensor;
    tensor.name = name;
    tensor.type = "F32";
    tensor.shape = {static_cast<std::int64_t>(bytes / 4)};
    tensor.bytes = bytes;
    tensor.layer = layer;
    tensor.role = is_expert_tensor(name)                ? TensorRole::experts
                  : name.rfind("token_embd.", 0) == 0 ? TensorRole::embedding
                  : name.rfind("output.", 0) == 0     ? TensorRole::output
                                                      : TensorRole::weights;
    info.tensors.push_back(std::move(tensor));
}

// The header of a model: one MiB for each tensor, ten for each expert tensor.
inline GgufInfo moe_header(int layers = 4) {
    GgufInfo info;
    info.path = "moe.gguf";
    info.architecture = "llama";
    info.layer_count = layers;
    info.expert_count = 8;
    info.experts_used = 2;
    info.metadata["llama.embedding_length"] = std::uint64_t{64};
    info.metadata["llama.attention.head_count"] = std::uint64_t{4};
    info.metadata["llama.attention.head_count_kv"] = std::uint64_t{2};
    add_tensor(info, "token_embd.weight", kMiB);
    for (int layer = 0; layer < layers; layer++) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        for (const char* name : {"attn_q.weight", "ffn_gate_inp.weight", "ffn_up_shexp.weight"}) {
            add_tensor(info, block + name, kMiB, layer);
        }
        for (const char* name : {"ffn_up_exps.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight"}) {
            add_tensor(info, block + name, 10 * kMiB, layer);
        }
    }
    add_tensor(info, "output_norm.weight", kMiB);
    add_tensor(info, "output.weight", kMiB);
    return info;
}

inline GgufInfo dense_header() {
    auto info = moe_header();
    info.expert_count = info.experts_used = 0;
    info.tensors.erase(std::remove_if(info.tensors.begin(), info.tensors.end(), [](const auto& t) { return t.role == TensorRole::experts; }),
                       info.tensors.end());
    return info;
}

}  // namespace test
