#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <map>
#include <string>

#include "llama_moe/gguf_file.h"

namespace llama_moe::bindings {

pybind11::typing::Dict<pybind11::str, pybind11::object> to_python(const std::map<std::string, MetadataValue>& metadata);

}  // namespace llama_moe::bindings
