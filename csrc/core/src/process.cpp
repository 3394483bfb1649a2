#include "llama_moe/process.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <string>

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

std::atomic<bool> g_forked{false};
std::atomic<pid_t> g_owner{0};

}  // namespace

void belong_to_this_process() {
    static const bool registered = [] {
        g_owner = getpid();
        pthread_atfork(nullptr, nullptr, [] { g_forked.store(true); });
        return true;
    }();
    static_cast<void>(registered);
}

bool forked() {
    return g_forked.load(std::memory_order_relaxed);
}

void require_same_process(const char* subject) {
    if (forked()) {
        throw ClosedError(std::string(subject) + " belongs to process " + std::to_string(g_owner.load()) +
                          "; llama.cpp cannot be used in a forked child: use the 'spawn' start method, or fork before the first load");
    }
}

}  // namespace llama_moe
