#pragma once

#include <string>

namespace llama_moe {

// Registers the backends that lie in lib/ next to this module: of the CPU's the best one for this processor, and RPC. A build
// with its backends linked in has no such folder, and nothing happens. Called once, by start_backend().
void load_own_backends();

// Which of them it was, such as "haswell" or "zen4"; empty for one that is linked in.
std::string cpu_variant();

// A function that a backend offers by name. The one way to call what is not in ggml's base library, which works whether the
// backend is linked in or loaded. Throws when there is no such backend or function.
void* backend_function(const char* backend, const char* name);

}  // namespace llama_moe
