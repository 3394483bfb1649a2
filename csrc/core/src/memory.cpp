#include "llama_moe/memory.h"

#include <algorithm>

namespace llama_moe {

void add_bytes(std::vector<MemoryRow>& rows, const std::string& device, const std::string& role, std::uint64_t bytes) {
    const auto same = std::find_if(rows.begin(), rows.end(), [&](const auto& row) { return row.device == device && row.role == role; });
    if (same != rows.end()) {
        same->bytes += bytes;
    } else if (bytes > 0) {
        rows.push_back({device, role, bytes});
    }
}

}  // namespace llama_moe
