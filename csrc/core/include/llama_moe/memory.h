#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llama_moe {

struct MemoryRow {
    std::string device;
    std::string role;  // "experts", "weights", "kv_cache" or "compute"
    std::uint64_t bytes;
};

// Adds to the row of that device and role, or a row for them.
void add_bytes(std::vector<MemoryRow>& rows, const std::string& device, const std::string& role, std::uint64_t bytes);

// One line of llama.cpp's own account.
struct BreakdownRow {
    std::string buffer_type;
    std::string device;  // where that memory is: a host buffer of a GPU counts as "CPU"
    bool host;
    std::string kind;  // "model", "context" or "compute"
    std::uint64_t bytes;
};

}  // namespace llama_moe
