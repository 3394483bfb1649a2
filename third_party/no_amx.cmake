# Included by ggml's project() call (CMAKE_PROJECT_ggml_INCLUDE), in our build and in that of a peer we compare with.
# It leaves llama.cpp's AMX kernels out, also where -march=native would bring them in, because at this pin
#  - GCC 12 miscompiles them (it removes the stores that configure the tiles, as dead): SIGILL at the first prompt;
#  - with that cured, they refuse the permuted activations of MLA attention only when the graph is built, after the
#    weights were taken at load: making a context of a deepseek2 model aborts;
#  - their results differ from all other kernels by far more than rounding, so that greedy text differs too.
# AVX-512 kernels take their place.
if(NOT MSVC)
  add_compile_options(-U__AMX_INT8__)
endif()
