#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "llama_moe/gguf_file.h"

namespace llama_moe::bindings {

pybind11::dict to_python(const std::map<std::string, MetadataValue>& metadata);

}  // namespace llama_moe::bindings
