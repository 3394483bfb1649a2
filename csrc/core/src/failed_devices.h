#pragma once

#include <string>
#include <vector>

#include "ggml-backend.h"

namespace llama_moe {

// RPC workers that died. ggml's connection to one stays broken for as long as this process lives: a call that needs it never returns.
bool any_failed(const std::vector<ggml_backend_dev_t>& devices);

// Whether it was ggml's RPC client that aborted.
bool is_remote_failure(const std::string& abort_message);

// For a call that uses `devices` and did not return after such an abort: finds out which workers are gone, and whether the call is lost.
bool find_failed(const std::vector<ggml_backend_dev_t>& devices);

}  // namespace llama_moe
