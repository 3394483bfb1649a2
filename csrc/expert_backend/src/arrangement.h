#pragma once

#include <cstdint>

namespace llama_moe::experts {

// How the bits of a packed block's weights lie where ggml's order would take kernels many operations to take apart, or would have them read
// back and forth (tile.h says what they read). Both change the block of 16 rows in place.
struct Arrangement {
    void (*arrange)(std::uint8_t* block);
    void (*restore)(std::uint8_t* block);
};

extern const Arrangement arrangement_of_q5, arrangement_of_q3_k, arrangement_of_q5_k, arrangement_of_q6_k;

}  // namespace llama_moe::experts
