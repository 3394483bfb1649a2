#include "openmp_threads.h"

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
#include <omp.h>
#endif

namespace llama_moe {

void end_openmp_threads() {
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)  // what other libraries pause is the whole process
    omp_pause_resource_all(omp_pause_soft);
#endif
}

}  // namespace llama_moe
