# Included by ggml's project() call (CMAKE_PROJECT_ggml_INCLUDE), in our build and in that of a peer we compare with.
#
# GCC 12 believes that _tile_loadconfig reads 8 bytes of its 64-byte operand and removes the stores of the rest as dead:
# on a CPU with AMX the tiles stay unconfigured and the first tile instruction raises SIGILL.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Deferred to the end of ggml's directory: its targets do not exist yet.
  cmake_language(
    EVAL CODE "cmake_language(DEFER CALL set_source_files_properties
      \"${CMAKE_CURRENT_SOURCE_DIR}/src/ggml-cpu/amx/mmq.cpp\" TARGET_DIRECTORY ggml
      PROPERTIES COMPILE_OPTIONS \"-fno-dse;-fno-tree-dse\")")
endif()
