#include "llama_moe/routing.h"

#include <vector>

#include "llama_moe/error.h"
#include "micro_batches.h"
#include "test_support.h"

using namespace llama_moe;

namespace {

// A batch of these sequences, one token each; tokens are their index unless `same`.
std::vector<BatchRow> batch_of(const std::vector<int>& sequences, bool same = false) {
    std::vector<BatchRow> rows;
    for (std::size_t i = 0; i < sequences.size(); i++) {
        rows.push_back({{same ? 7 : static_cast<std::int32_t>(i), 0, sequences[i], -1}, false});
    }
    return rows;
}

RoutedTokens routed(std::int64_t count) {
    RoutedTokens tokens;
    tokens.tokens = {{1, 0, 0, 0}};
    tokens.counts = {count, 0, 0, count};
    tokens.choices = {0, 1};
    tokens.weights = {0.25f, 0.75f};
    return tokens;
}

}  // namespace

TEST_CASE("micro-batches of a shared buffer are in the order of the batch") {
    const auto batch = batch_of({0, 1, 0, 2, 1});
    MicroBatches cut(batch, true);
    CHECK(cut.take({0, 1, 2}) == std::vector<int>({0, 1, 2}));
    CHECK(cut.take({3, 4}) == std::vector<int>({3, 4}));
}

TEST_CASE("micro-batches of own buffers have equally many tokens of sequences that follow each other") {
    const auto batch = batch_of({0, 0, 0, 1, 1, 3, 3});
    MicroBatches cut(batch, false);
    CHECK(cut.take({0, 1, 3, 4}) == std::vector<int>({0, 1, 3, 4}));
    CHECK(cut.take({2}) == std::vector<int>({2}));
    CHECK(cut.take({5, 6}) == std::vector<int>({5, 6}));
}

TEST_CASE("micro-batches of interleaved sequences are told apart") {
    const auto batch = batch_of({0, 2, 1, 0, 2, 1});
    MicroBatches cut(batch, false);
    CHECK(cut.take({0, 2, 1}) == std::vector<int>({0, 2, 1}));  // 2 follows 1 only when 1 was taken: its second token
    CHECK(cut.take({3, 5}) == std::vector<int>({3, 5}));        // and it has none any more
    CHECK(cut.take({4}) == std::vector<int>({4}));
}

TEST_CASE("micro-batches of equal tokens go to the sequence that llama.cpp takes") {
    const auto batch = batch_of({0, 0, 2, 2}, true);
    MicroBatches own(batch, false);
    CHECK(own.take({7, 7}) == std::vector<int>({0, 1}));  // 2 does not follow 0
    CHECK(own.take({7, 7}) == std::vector<int>({2, 3}));
    MicroBatches shared(batch, true);
    CHECK(shared.take({7, 7, 7}) == std::vector<int>({0, 1, 2}));
}

TEST_CASE("a micro-batch of other tokens belongs to nobody") {
    const auto batch = batch_of({0, 1});
    MicroBatches cut(batch, false);
    CHECK(cut.take({5, 6}) == std::vector<int>({-1, -1}));
    CHECK(cut.take({0, 1, 2}) == std::vector<int>({-1, -1, -1}));
    CHECK(cut.take({0, 1}) == std::vector<int>({0, 1}));
}

TEST_CASE("a routing trace has what it asked for, until it ends") {
    RoutingHub hub({2, 2, 2, {0}});
    CHECK(hub.active().empty());
    const auto counts = hub.start({}, 3);
    const auto choices = hub.start({true, false}, 3);
    const auto running = hub.active();
    CHECK(running.size() == 2);
    for (const auto& trace : running) {
        trace->add(routed(1));
    }
    hub.end(counts);
    CHECK(hub.active().size() == 1);
    for (const auto& trace : running) {  // a batch that was being computed at the end
        trace->add(routed(1));
    }
    CHECK(!counts->active() && choices->active());
    CHECK(counts->counts().tokens == 1 && counts->counts().counts == std::vector<std::int64_t>({1, 0, 0, 1}));
    RoutedTokens records;
    CHECK(choices->records(records).tokens == 2);
    CHECK(records.choices == std::vector<std::uint16_t>({0, 1, 0, 1}) && records.weights.empty() && records.tokens.size() == 2);
    counts->records(records);
    CHECK(records.choices.empty() && records.tokens.empty());
    hub.end(counts);  // again
}

TEST_CASE("a model without experts has no routing") {
    RoutingHub hub({2, 0, 0, {}});
    CHECK_THROWS(InvalidOptionError, hub.start({}, 0));
}
