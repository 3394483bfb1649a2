#include "mapped_file.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#endif

namespace llama_moe::experts {

#ifdef __linux__
namespace {

// Whether a mapping that cannot be written and shares a file's pages has all of the range: nothing is lost there. A line of
// /proc/self/maps is "begin-end permissions offset device inode path".
bool maps_a_file(std::uintptr_t begin, std::uintptr_t end) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        std::istringstream fields(line);
        std::uintptr_t first = 0;
        std::uintptr_t last = 0;
        std::string permissions;
        char dash = 0;
        if (fields >> std::hex >> first >> dash >> last >> permissions && first <= begin && end <= last) {
            return permissions == "r--s";
        }
    }
    return false;
}

}  // namespace

void release_pages(const void* data, std::size_t size) {
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    // Whole pages: what lies next to it may still be read.
    const std::uintptr_t begin = (address + page - 1) / page * page;
    const std::uintptr_t end = (address + size) / page * page;
    if (begin < end && maps_a_file(begin, end)) {
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }
}
#else
void release_pages(const void*, std::size_t) {}
#endif

}  // namespace llama_moe::experts
