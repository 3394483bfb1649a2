#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace llama_moe {

// Tells who watches a file descriptor, such as an event loop, which requests have news. A request that is waited for adds its
// tag; the descriptor becomes readable with the first one and stays so until take().
//
// Its lock is the last one taken: it may be taken while an engine's or a request's is held.
class Notifier {
   public:
    Notifier();
    ~Notifier();
    Notifier(const Notifier&) = delete;
    Notifier& operator=(const Notifier&) = delete;

    int file_descriptor() const;  // -1 when closed
    void notify(std::uint64_t tag);
    // The tags since the last call, oldest first. Never waits.
    std::vector<std::uint64_t> take();
    // Later notifications are dropped. Idempotent.
    void close();

   private:
    mutable std::mutex mutex_;
    int descriptor_;
    std::vector<std::uint64_t> tags_;
};

}  // namespace llama_moe
