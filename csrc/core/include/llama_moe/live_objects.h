#pragma once

#include <atomic>

namespace llama_moe {

// How many of each native object there are, for leak tests.
struct LiveObjects {
    std::atomic<int> models{0};
    std::atomic<int> contexts{0};
    std::atomic<int> engines{0};
    std::atomic<int> generations{0};
    std::atomic<int> notifiers{0};
};

LiveObjects& live_objects();

}  // namespace llama_moe
