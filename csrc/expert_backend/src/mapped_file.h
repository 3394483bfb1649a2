#pragma once

#include <cstddef>

namespace llama_moe::experts {

// Gives back the pages of these bytes, which were read and are not needed again, if they are a mapping of a file that nobody writes: else
// the file and its copy are in memory together. The system keeps the file in its cache all the same.
void release_pages(const void* data, std::size_t size);

}  // namespace llama_moe::experts
