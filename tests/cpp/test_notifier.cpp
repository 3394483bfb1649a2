#include "llama_moe/notifier.h"

#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "llama_moe/live_objects.h"
#include "test_support.h"

using namespace llama_moe;

namespace {

using Tags = std::vector<std::uint64_t>;

bool readable(const Notifier& notifier, int timeout_ms = 0) {
    pollfd watched{notifier.file_descriptor(), POLLIN, 0};
    return ::poll(&watched, 1, timeout_ms) == 1;
}

}  // namespace

TEST_CASE("a notifier's descriptor is readable from the first tag until the tags are taken") {
    Notifier notifier;
    CHECK(!readable(notifier));
    CHECK_EQ(notifier.take(), Tags{});
    notifier.notify(7);
    CHECK(readable(notifier));
    notifier.notify(3);
    notifier.notify(7);
    CHECK_EQ(notifier.take(), (Tags{7, 3, 7}));
    CHECK(!readable(notifier));
    notifier.notify(9);
    CHECK(readable(notifier));
    CHECK_EQ(notifier.take(), Tags{9});
}

TEST_CASE("a notifier's descriptor does not block and is not inherited by programs") {
    const Notifier notifier;
    CHECK((::fcntl(notifier.file_descriptor(), F_GETFL) & O_NONBLOCK) != 0);
    CHECK((::fcntl(notifier.file_descriptor(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("a closed notifier has no descriptor and ignores what it is told") {
    const int before = live_objects().notifiers;
    {
        Notifier notifier;
        CHECK_EQ(live_objects().notifiers, before + 1);
        const int descriptor = notifier.file_descriptor();
        notifier.notify(1);
        notifier.close();
        notifier.close();
        CHECK_EQ(notifier.file_descriptor(), -1);
        CHECK_EQ(::fcntl(descriptor, F_GETFD), -1);
        notifier.notify(2);
        CHECK_EQ(notifier.take(), Tags{});
    }
    CHECK_EQ(live_objects().notifiers, before);
}

TEST_CASE("no tag of many threads is lost or comes twice") {
    Notifier notifier;
    constexpr std::uint64_t kThreads = 4;
    constexpr std::uint64_t kEach = 5000;
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < kThreads; t++) {
        threads.emplace_back([&notifier, t] {
            for (std::uint64_t i = 0; i < kEach; i++) {
                notifier.notify(t * kEach + i);
            }
        });
    }
    Tags all;
    while (all.size() < kThreads * kEach && readable(notifier, 60'000)) {
        const auto tags = notifier.take();
        all.insert(all.end(), tags.begin(), tags.end());
    }
    for (auto& thread : threads) {
        thread.join();
    }
    std::sort(all.begin(), all.end());
    REQUIRE(all.size() == kThreads * kEach);
    for (std::uint64_t i = 0; i < all.size(); i++) {
        CHECK_EQ(all[i], i);
    }
}
