#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "format.h"
#include "glu.h"

namespace llama_moe::experts {

// Multiplies one packed group of 16 rows of `k` weights with `tokens` rows of activations: outputs[t][0..15] = group x activations of
// row rows[t].
using MultiplyGroup = void (*)(const std::uint8_t* group, const ActivationRows& activations, const std::int32_t* rows, float* const* outputs, int tokens);

// The sum of the products of two rows of numbers.
using Dot = float (*)(const float* a, const float* b, std::int64_t count);

// The kernels for one kind of processor.
struct KernelSet {
    const char* name;  // "avx512-vnni", "avx-vnni", "avx2", "neon-dotprod", "portable"
    MultiplyGroup (*find)(ggml_type type);  // null for a type without one
    RoundRow round_row;
    ApplyGlu apply_glu;
    Dot dot;
};

// The best for this processor first; the portable one is the last.
const std::vector<KernelSet>& usable_kernels();

// Each is there where its file is compiled (CMakeLists.txt).
extern const KernelSet portable_kernels;
extern const KernelSet avx2_kernels;
extern const KernelSet avx_vnni_kernels;
extern const KernelSet avx512_kernels;
extern const KernelSet neon_kernels;

}  // namespace llama_moe::experts
