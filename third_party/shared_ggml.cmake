# Included by ggml's project() call in a build with dynamic backends. Backends that are loaded at run time need ggml as a shared
# library; llama.cpp itself stays static, so that nothing of it is visible outside of our module.
include("${CMAKE_CURRENT_LIST_DIR}/no_amx.cmake")
set(BUILD_SHARED_LIBS ON)
