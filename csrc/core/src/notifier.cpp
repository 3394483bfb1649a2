#include "llama_moe/notifier.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "llama_moe/error.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/process.h"

namespace llama_moe {
namespace {

int make_descriptor() {
    require_same_process("llama.cpp");
    const int descriptor = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (descriptor < 0) {
        throw Error(std::string("no event descriptor could be made: ") + std::strerror(errno));
    }
    return descriptor;
}

}  // namespace

Notifier::Notifier() : descriptor_(make_descriptor()) {
    live_objects().notifiers++;
}

Notifier::~Notifier() {
    close();
    live_objects().notifiers--;
}

int Notifier::file_descriptor() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return descriptor_;
}

void Notifier::notify(std::uint64_t tag) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (descriptor_ < 0) {
        return;
    }
    tags_.push_back(tag);
    if (tags_.size() == 1) {
        const std::uint64_t one = 1;
        static_cast<void>(!::write(descriptor_, &one, sizeof(one)));  // fails only when it is readable anyway
    }
}

std::vector<std::uint64_t> Notifier::take() {
    std::vector<std::uint64_t> tags;
    std::lock_guard<std::mutex> lock(mutex_);
    tags.swap(tags_);
    if (!tags.empty()) {
        std::uint64_t count = 0;
        static_cast<void>(!::read(descriptor_, &count, sizeof(count)));
    }
    return tags;
}

void Notifier::close() {
    // In a forked child the lock may be one that nobody will give back; the descriptor there goes with the process.
    if (forked()) {
        return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (descriptor_ >= 0) {
        ::close(descriptor_);
        descriptor_ = -1;
    }
    tags_.clear();
}

}  // namespace llama_moe
