#pragma once

#include <cstdint>

namespace llama_moe::experts {

// A gated linear unit: activation(gate) x up, as ggml has them (GGML_GLU_OP_*).
struct Glu {
    enum class Kind { swiglu, geglu, geglu_quick, reglu, swiglu_oai };
    Kind kind = Kind::swiglu;
    float alpha = 1, limit = 0;  // of swiglu_oai
};

// to[i] = activation(gate[i]) x up[i].
using ApplyGlu = void (*)(const Glu& glu, const float* gate, const float* up, float* to, std::int64_t count);

}  // namespace llama_moe::experts
