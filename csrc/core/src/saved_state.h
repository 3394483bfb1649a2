#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace llama_moe {

// What is saved of a KV cache, so that one of another model or a damaged one is refused before llama.cpp reads it.
enum class StateKind : std::int32_t { sequence = 0, context = 1, prefix = 2 };

constexpr std::size_t kStateHeaderBytes = 40;

// Fills in the first kStateHeaderBytes of `data`, once the payload is behind them.
void write_state_header(std::string& data, StateKind kind, std::uint64_t model_fingerprint);

// The payload. Throws InvalidOptionError for what is damaged or of another kind or version.
std::string_view unpack_state(std::string_view data, StateKind kind);

// Throws InvalidOptionError when the state is of another model, or of the model with other adapters.
void check_state_model(std::string_view data, std::uint64_t model_fingerprint);

}  // namespace llama_moe
