// Included ahead of everything else by llama.cpp's sources that print to stderr: what they print goes to llama.cpp's log.
#pragma once

#include <cstdio>

#include "ggml.h"

void llama_log_internal(ggml_log_level level, const char* format, ...);

#define fprintf(stream, ...) llama_log_internal(GGML_LOG_LEVEL_ERROR, __VA_ARGS__)
