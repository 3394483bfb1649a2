#pragma once

// The processor's vector instructions as functions. Tests compile kernels for a processor that they do not run on with a header that has
// the same functions in plain C++ (tests/kernels).
#if defined(LLAMA_MOE_EMULATED_INTRINSICS)
#include "emulated_intrinsics.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
