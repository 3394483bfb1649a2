#pragma once

#include <cstdint>

namespace llama_moe {

// Bytes of host memory that can be used without swapping; the largest number when the system does not tell.
std::uint64_t available_ram();

}  // namespace llama_moe
