#include "thread_team.h"

#include <algorithm>
#include <memory>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace llama_moe::experts {
namespace {

// Some ten microseconds.
constexpr int kSpins = 20000;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

long process() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

}  // namespace

ThreadTeam& ThreadTeam::of_this_thread() {
    struct Own {
        std::unique_ptr<ThreadTeam> team = std::make_unique<ThreadTeam>();
        long owner = process();
    };
    thread_local Own own;
    if (own.owner != process()) {
        static_cast<void>(own.team.release());  // its threads are not here to be joined
        own = {};
    }
    return *own.team;
}

ThreadTeam::~ThreadTeam() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        round_++;
    }
    begins_.notify_all();
    for (auto& member : members_) {
        member.join();
    }
}

void ThreadTeam::grow(int threads) {
    try {
        while (static_cast<int>(members_.size()) < threads - 1) {
            members_.emplace_back(&ThreadTeam::serve, this, static_cast<int>(members_.size()) + 1, round_.load());
        }
    } catch (const std::system_error&) {
        // Then with fewer.
    }
}

void ThreadTeam::run(int threads, const std::function<void(int thread, int threads)>& work) {
    grow(threads);
    work_ = &work;
    threads_ = std::min(threads, static_cast<int>(members_.size()) + 1);
    working_ = static_cast<int>(members_.size());
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        round_++;
    }
    begins_.notify_all();
    work(0, threads_);
    for (int spins = 0; working_ > 0; spins++) {
        spins < kSpins ? pause() : std::this_thread::yield();
    }
}

// A member takes part in every round, if only to say that it has seen it: the next one must not begin before.
void ThreadTeam::serve(int thread, std::uint64_t seen) {
    for (;;) {
        for (int spins = 0; round_ == seen && spins < kSpins; spins++) {
            pause();
        }
        {
            std::unique_lock<std::mutex> lock(mutex_);
            begins_.wait(lock, [&] { return round_ != seen; });
            if (stopping_) {
                return;
            }
        }
        seen = round_;
        if (thread < threads_) {
            (*work_)(thread, threads_);
        }
        working_--;
    }
}

}  // namespace llama_moe::experts
