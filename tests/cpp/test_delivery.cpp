// How tokens come to who asked for them: at once or waited for, told by a notifier, and only until a deadline.
#include <poll.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "eventually.h"
#include "llama_moe/engine.h"
#include "llama_moe/error.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;
using test::contains;

namespace {

using Tokens = std::vector<std::int32_t>;
using Tags = std::vector<std::uint64_t>;

std::shared_ptr<Engine> make_engine(int sequences = 1, int context_size = 8 * 1024) {
    static const auto model = test::load_tiny_model();
    EngineOptions options;
    options.context_size = context_size;
    options.max_sequences = sequences;
    options.micro_batch_size = 16;
    options.threads = 1;
    options.kv_type = "f32";
    options.flash_attention = "off";
    return Engine::create(model, options);
}

SamplingOptions greedy(std::optional<int> max_tokens) {
    SamplingOptions sampling;
    sampling.temperature = 0;
    sampling.max_tokens = max_tokens;
    sampling.ignore_eos = true;
    return sampling;
}

DeliveryOptions within(double seconds) {
    DeliveryOptions delivery;
    delivery.timeout = seconds;
    return delivery;
}

Tokens prompt_of(std::size_t count) {
    return Tokens(count, test::byte_token('a'));
}

Tokens read(Generation& generation, bool wait = true) {
    Tokens tokens;
    for (bool ended = false; !ended;) {
        const auto delivered = generation.take(wait);
        for (const auto& token : delivered.tokens) {
            tokens.push_back(token.id);
        }
        ended = delivered.ended;
    }
    return tokens;
}

bool wait_until_readable(const Notifier& notifier) {
    pollfd watched{notifier.file_descriptor(), POLLIN, 0};
    return ::poll(&watched, 1, 60'000) == 1;
}

}  // namespace

TEST_CASE("all tokens that nobody took come at once, with the end") {
    const auto engine = make_engine();
    const auto generation = engine->submit(prompt_of(5), greedy(30));
    REQUIRE(test::eventually([&] { return engine->stats().requests_finished == 1; }));
    REQUIRE(test::eventually([&] {
        try {
            generation->result();
            return true;
        } catch (const Error&) {
            return false;
        }
    }));
    const auto delivered = generation->take(/*wait=*/false);
    CHECK_EQ(delivered.tokens.size(), 30u);
    CHECK(delivered.ended);
    const auto again = generation->take(/*wait=*/true);
    CHECK(again.tokens.empty() && again.ended);
}

TEST_CASE("a notifier tells of news once for each time that there was none") {
    const auto engine = make_engine();
    const auto expected = read(*engine->submit(prompt_of(5), greedy(200)));
    DeliveryOptions delivery;
    delivery.notifier = std::make_shared<Notifier>();
    delivery.tag = 42;
    const auto generation = engine->submit(prompt_of(5), greedy(200), delivery);
    Tokens tokens;
    for (bool ended = false; !ended;) {
        const auto delivered = generation->take(/*wait=*/false);
        for (const auto& token : delivered.tokens) {
            tokens.push_back(token.id);
        }
        ended = delivered.ended;
        if (delivered.tokens.empty() && !ended) {
            REQUIRE(wait_until_readable(*delivery.notifier));
            CHECK_EQ(delivery.notifier->take(), Tags{42});
        }
    }
    CHECK_EQ(tokens, expected);
}

TEST_CASE("a notifier is not told while nobody asks, and of the end when somebody does") {
    const auto engine = make_engine();
    DeliveryOptions delivery;
    delivery.notifier = std::make_shared<Notifier>();
    const auto unread = engine->submit(prompt_of(5), greedy(50), delivery);
    delivery.tag = 1;
    const auto endless = engine->submit(prompt_of(5), greedy(std::nullopt), delivery);
    while (!endless->take(/*wait=*/false).tokens.empty()) {
    }
    REQUIRE(wait_until_readable(*delivery.notifier));
    CHECK_EQ(delivery.notifier->take(), Tags{1});  // by now the other one has ended
    CHECK_EQ(read(*unread, /*wait=*/false).size(), 50u);
    while (!endless->take(/*wait=*/false).tokens.empty()) {
    }
    endless->cancel();
    REQUIRE(wait_until_readable(*delivery.notifier));
    CHECK_EQ(delivery.notifier->take(), Tags{1});
    CHECK(endless->take(/*wait=*/false).ended);
}

TEST_CASE("a wait ends at the deadline, in the queue, in a prompt and between tokens, and frees the place") {
    const auto engine = make_engine(1, 16 * 1024);
    const auto expected = read(*engine->submit(prompt_of(5), greedy(5)));
    {
        const auto in_prompt = engine->submit(prompt_of(16'000), greedy(5), within(0.5));
        const auto queued = engine->submit(prompt_of(5), greedy(5), within(0.05));
        CHECK(contains(CHECK_THROWS(TimeoutError, read(*queued)), "within its timeout of 0.05 s; it still waited for a free sequence"));
        CHECK(contains(CHECK_THROWS(TimeoutError, read(*in_prompt)), "within its timeout of 0.5 s; its prompt was being computed"));
    }
    CHECK_EQ(read(*engine->submit(prompt_of(5), greedy(5))), expected);
    const auto generating = engine->submit(prompt_of(5), greedy(std::nullopt), within(0.2));
    CHECK(contains(CHECK_THROWS(TimeoutError, read(*generating)), "within its timeout of 0.2 s"));
    CHECK_THROWS(TimeoutError, generating->take(/*wait=*/true));  // and again
    CHECK_EQ(read(*engine->submit(prompt_of(5), greedy(5))), expected);
    CHECK(test::eventually([&] { return engine->stats().requests_running == 0 && engine->stats().requests_finished == 6; }));
}

TEST_CASE("a request that nobody reads ends at its deadline too, and what came before it can be read") {
    const auto engine = make_engine();
    const auto unread = engine->submit(prompt_of(5), greedy(std::nullopt), within(0.1));
    const auto behind = engine->submit(prompt_of(5), greedy(5));  // there is one place
    CHECK_EQ(read(*behind).size(), 5u);
    CHECK(!unread->take(/*wait=*/false).tokens.empty());
    CHECK_THROWS(TimeoutError, unread->take(/*wait=*/false));
}

TEST_CASE("a request that ends in time has no use for its deadline") {
    const auto engine = make_engine();
    for (const double seconds : {60.0, 1e12, std::numeric_limits<double>::infinity()}) {
        CHECK_EQ(read(*engine->submit(prompt_of(5), greedy(5), within(seconds))).size(), 5u);
    }
}

TEST_CASE("a timeout that cannot be meant is refused") {
    const auto engine = make_engine();
    for (const double seconds : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN()}) {
        CHECK(contains(CHECK_THROWS(InvalidOptionError, engine->submit(prompt_of(5), greedy(5), within(seconds))), "it must be a number of seconds above 0"));
    }
    CHECK_EQ(engine->stats().requests_submitted, 0u);
}
