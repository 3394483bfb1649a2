// How fast files are read, for models that do not fit the memory.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>

#include "llama_moe/bandwidth.h"
#include "llama_moe/error.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kAlignment = 4096;
// What the kernel reads ahead at a page fault of a mapped file, where nobody set another size. Disks are much faster at larger pieces,
// which a mapped model does not get.
constexpr std::size_t kChunk = 128 << 10;
constexpr std::uint64_t kLeastBytes = 1 << 20;
constexpr std::uint64_t kMostBytes = 512ull << 20;
constexpr double kMostSeconds = 1.0;

class File {
   public:
    File(const std::string& path, int flags) : descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC | flags)) {}
    ~File() {
        if (descriptor_ >= 0) {
            close(descriptor_);
        }
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    int descriptor() const { return descriptor_; }

   private:
    int descriptor_;
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

std::uint64_t regular_file_size(const std::string& path) {
    struct stat status {};
    if (stat(path.c_str(), &status) != 0) {
        if (errno == ENOENT) {
            throw FileNotFoundError("no such file: '" + path + "'");
        }
        throw Error("cannot read '" + path + "': " + std::strerror(errno));
    }
    if (!S_ISREG(status.st_mode)) {
        throw InvalidOptionError("'" + path + "' is not a file that can be read to measure its disk");
    }
    if (static_cast<std::uint64_t>(status.st_size) < kLeastBytes) {
        throw InvalidOptionError("'" + path + "' has " + std::to_string(status.st_size) + " bytes; measuring a disk takes a file of 1 MiB or more");
    }
    return static_cast<std::uint64_t>(status.st_size);
}

// Chunks all over the file, in an order that no read-ahead follows. False: the file system refuses to read this way.
bool read_chunks(int descriptor, std::uint64_t size, const std::atomic<bool>& stop, DiskRate& rate) {
    const std::unique_ptr<void, Free> buffer(std::aligned_alloc(kAlignment, kChunk));
    const std::uint64_t chunks = size / kChunk;
    // A step of about 0.618 of the file goes far from what was read before; without a common divisor it visits every chunk once.
    std::uint64_t step = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(static_cast<double>(chunks) * 0.618));
    while (std::gcd(step, chunks) != 1) {
        step++;
    }
    const auto begin = Clock::now();
    double seconds = 0;
    for (std::uint64_t i = 0; i < chunks && rate.bytes_read < kMostBytes && seconds < kMostSeconds; i++) {
        if (stop.load()) {
            throw CancelledError("the measurement was interrupted");
        }
        const ssize_t got = pread(descriptor, buffer.get(), kChunk, static_cast<off_t>(i * step % chunks * kChunk));
        if (got <= 0) {
            if (rate.bytes_read == 0 && errno == EINVAL) {
                return false;
            }
            throw Error(std::string("reading failed: ") + (got == 0 ? "the file became shorter" : std::strerror(errno)));
        }
        rate.bytes_read += static_cast<std::uint64_t>(got);
        seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    }
    rate.bytes_per_second = static_cast<double>(rate.bytes_read) / seconds;
    return true;
}

DiskRate disk_rate(const std::string& path, const std::atomic<bool>& stop) {
    DiskRate rate;
    const std::uint64_t size = regular_file_size(path);
#ifdef O_DIRECT
    {
        const File direct(path, O_DIRECT);
        rate.method = "direct";
        if (direct.descriptor() >= 0 && read_chunks(direct.descriptor(), size, stop, rate)) {
            return rate;
        }
    }
#endif
    const File file(path, 0);
    if (file.descriptor() < 0) {
        throw Error("cannot read '" + path + "': " + std::strerror(errno));
    }
    rate.method = "cached";
#ifdef POSIX_FADV_DONTNEED
    // Pages that a process has mapped stay; so this is a wish, and a file system in memory has no other place for them.
    if (posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED) == 0 && posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_RANDOM) == 0) {
        rate.method = "dropped";
    }
#endif
    read_chunks(file.descriptor(), size, stop, rate);
    return rate;
}

}  // namespace

DiskRate measure_disk(const std::string& path, const Poll& poll) {
    auto rate = std::make_shared<DiskRate>();
    auto stop = std::make_shared<std::atomic<bool>>(false);
    run_native([=] { *rate = disk_rate(path, *stop); }, poll, [stop] { stop->store(true); });
    return *rate;
}

}  // namespace llama_moe
