#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>

#include "llama_moe/error.h"
#include "loaded_model.h"
#include "simulated_decoder.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;

namespace {

using Tokens = std::vector<std::int32_t>;

const SamplingVocabulary& vocabulary() {
    static const auto model = test::load_tiny_model();
    static const SamplingVocabulary instance(model->acquire()->model);
    return instance;
}

// The scheduler over a simulated decoder, driven step by step.
class Simulation {
   public:
    explicit Simulation(const test::SimulatedDecoder::Options& options = {}, bool with_end = false)
        : decoder(options, vocabulary().size, with_end ? test::kEos : test::byte_token('a'), test::byte_token('z')),
          pool(2),
          scheduler(decoder, vocabulary(), pool) {}

    std::shared_ptr<Request> request(Tokens prompt, std::optional<int> max_tokens, RequestKind kind = RequestKind::generate) {
        SamplingOptions sampling;
        sampling.temperature = 0;
        sampling.max_tokens = max_tokens;
        return std::make_shared<Request>(kind, std::move(prompt), sampling, vocabulary(), decoder.limits().context_size);
    }

    void submit(const std::shared_ptr<Request>& request) { queue.push_back(request); }

    std::shared_ptr<Request> submit(Tokens prompt, std::optional<int> max_tokens, RequestKind kind = RequestKind::generate) {
        auto made = request(std::move(prompt), max_tokens, kind);
        submit(made);
        return made;
    }

    void step() {
        scheduler.release_ended();
        while (!queue.empty() && scheduler.accepts()) {
            auto next = queue.front();
            queue.erase(queue.begin());
            if (!next->cancelled) {
                scheduler.admit(std::move(next));
            }
        }
        scheduler.step();
        for (auto& [ended, reason, error] : scheduler.take_ended()) {
            error ? ended->fail(error) : ended->finish(reason);
        }
        auto preempted = scheduler.take_preempted();
        queue.insert(queue.begin(), preempted.begin(), preempted.end());
        steps++;
    }

    // Returns false when there was no end to it.
    bool run(int most = 20000) {
        while ((scheduler.active() || !queue.empty()) && most-- > 0) {
            step();
        }
        return !scheduler.active() && queue.empty();
    }

    test::SimulatedDecoder decoder;
    WorkerPool pool;
    Scheduler scheduler;
    std::vector<std::shared_ptr<Request>> queue;
    int steps = 0;
};

Tokens generated(const Request& request) {
    return {request.tokens.begin() + static_cast<std::ptrdiff_t>(request.prompt_size), request.tokens.end()};
}

Tokens prompt_of(std::size_t size, unsigned seed) {
    std::mt19937 random(seed);
    Tokens tokens(size);
    for (auto& token : tokens) {
        token = test::byte_token(static_cast<char>('a' + random() % 26));
    }
    return tokens;
}

// What has to come: the continuation, cut at the end token, at max_tokens and at the context's end.
Tokens expected(const Simulation& simulation, const Request& request) {
    const Tokens prompt(request.tokens.begin(), request.tokens.begin() + static_cast<std::ptrdiff_t>(request.prompt_size));
    const int room = simulation.decoder.limits().context_size - static_cast<int>(prompt.size()) + 1;
    auto tokens = simulation.decoder.continuation(prompt, std::min(room, request.max_tokens.value_or(room)));
    tokens.erase(std::find(tokens.begin(), tokens.end(), test::kEos), tokens.end());
    return tokens;
}

}  // namespace

TEST_CASE("scheduler: a request gets what its tokens imply") {
    Simulation simulation;
    const auto request = simulation.submit(prompt_of(20, 1), 10);
    CHECK(simulation.run());
    CHECK_EQ(generated(*request), expected(simulation, *request));
    CHECK_EQ(request->result.finish_reason, "length");
    CHECK_EQ(simulation.scheduler.stats().prompt_tokens, 20u);
    CHECK_EQ(simulation.scheduler.stats().generated_tokens, 10u);
}

TEST_CASE("scheduler: random requests, cancels and failures in every configuration") {
    std::vector<test::SimulatedDecoder::Options> configurations(8);
    configurations[1].draft = 3;
    configurations[2].pool = 96;
    configurations[3].pool = 70;
    configurations[3].draft = 2;
    configurations[4].can_truncate = false;
    configurations[5].failures = 0.05;
    configurations[6].failures = 0.03;
    configurations[6].can_truncate = false;
    configurations[7].batch_size = 4;
    configurations[7].micro_batch_size = 2;
    for (std::size_t c = 0; c < configurations.size(); c++) {
        for (unsigned seed = 0; seed < 25; seed++) {
            auto options = configurations[c];
            options.seed = seed;
            Simulation simulation(options, /*with_end=*/seed % 2 == 0);
            std::mt19937 random(seed * 31 + static_cast<unsigned>(c));
            std::vector<std::shared_ptr<Request>> requests;
            for (int i = 0; i < 24; i++) {
                // A few beginnings that many share, and tails of their own.
                Tokens prompt = prompt_of(random() % 40, static_cast<unsigned>(random() % 3));
                const Tokens tail = prompt_of(1 + random() % 20, static_cast<unsigned>(random()));
                prompt.insert(prompt.end(), tail.begin(), tail.end());
                const auto max_tokens = random() % 5 == 0 ? std::nullopt : std::optional<int>(1 + static_cast<int>(random() % 20));
                requests.push_back(simulation.request(prompt, max_tokens));
            }
            std::size_t submitted = 0;
            while (submitted < requests.size() || simulation.scheduler.active() || !simulation.queue.empty()) {
                if (submitted < requests.size() && random() % 3 != 0) {
                    simulation.submit(requests[submitted++]);
                }
                if (random() % 12 == 0 && submitted > 0) {
                    auto& victim = *requests[random() % submitted];
                    victim.cancelled = true;
                    victim.finish("cancelled");
                }
                simulation.step();
                REQUIRE(simulation.steps < 20000);
            }
            for (const auto& request : requests) {
                const auto tokens = generated(*request);
                const auto whole = expected(simulation, *request);
                if (request->cancelled || request->error) {
                    // What there is of it is right.
                    REQUIRE(tokens.size() <= whole.size());
                    CHECK_EQ(tokens, Tokens(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(tokens.size())));
                    CHECK(!request->error || options.failures > 0);
                    if (request->error) {
                        CHECK_THROWS(DecodeError, std::rethrow_exception(request->error));
                    }
                } else {
                    CHECK(request->finished);
                    CHECK_EQ(tokens, whole);
                }
            }
            CHECK_EQ(simulation.scheduler.stats().requests_running, 0u);
            CHECK(simulation.scheduler.stats().draft_tokens_accepted <= simulation.scheduler.stats().draft_tokens);
        }
    }
}

TEST_CASE("scheduler: a long prompt takes one micro-batch of a step, and who generates gets a token in each") {
    Simulation simulation;
    std::vector<std::shared_ptr<Request>> running;
    for (unsigned i = 0; i < 3; i++) {
        running.push_back(simulation.submit(prompt_of(2, i + 10), 60));
    }
    while (std::any_of(running.begin(), running.end(), [](const auto& request) { return request->generated == 0; })) {
        simulation.step();
    }
    const auto late = simulation.submit(prompt_of(50, 99), 3);
    while (late->generated == 0) {
        std::vector<int> before;
        for (const auto& request : running) {
            before.push_back(request->generated);
        }
        simulation.step();
        for (std::size_t i = 0; i < running.size(); i++) {
            CHECK_EQ(running[i]->generated, before[i] + 1);
        }
        CHECK(static_cast<int>(simulation.decoder.last_batch.size()) <= simulation.decoder.limits().micro_batch_size);
    }
    CHECK(simulation.run());
}

TEST_CASE("scheduler: prompts take turns") {
    test::SimulatedDecoder::Options options;
    options.sequences = 3;
    Simulation simulation(options);
    std::vector<std::shared_ptr<Request>> requests;
    for (unsigned i = 0; i < 3; i++) {
        requests.push_back(simulation.submit(prompt_of(48, i), 1));
    }
    std::map<int, int> turns;
    for (int i = 0; i < 9; i++) {
        simulation.step();
        turns[simulation.decoder.last_batch.front().sequence]++;
    }
    CHECK_EQ(turns.size(), 3u);
    for (const auto& [sequence, count] : turns) {
        CHECK_EQ(count, 3);
    }
    CHECK(simulation.run());
}

TEST_CASE("scheduler: a second request computes only what the first did not have") {
    Simulation simulation;
    Tokens prompt = prompt_of(40, 1);
    const auto first = simulation.submit(prompt, 4);
    CHECK(simulation.run());
    prompt.push_back(test::byte_token('x'));
    const auto second = simulation.submit(prompt, 4);
    CHECK(simulation.run());
    CHECK_EQ(first->result.cached_tokens, 0);
    CHECK_EQ(second->result.cached_tokens, 40);
    CHECK_EQ(generated(*second), expected(simulation, *second));
    // The same prompt again: one token is computed for its logits.
    const auto third = simulation.submit(prompt, 4);
    CHECK(simulation.run());
    CHECK_EQ(third->result.cached_tokens, 40);
    CHECK_EQ(simulation.scheduler.stats().prompt_tokens, 42u);
    CHECK_EQ(simulation.scheduler.stats().cached_tokens, 80u);
}

TEST_CASE("scheduler: requests that come together compute what they share once") {
    for (const int pool : {0, 256}) {
        test::SimulatedDecoder::Options options;
        options.pool = pool;
        Simulation simulation(options);
        std::vector<std::shared_ptr<Request>> requests;
        for (unsigned i = 0; i < 4; i++) {
            Tokens prompt = prompt_of(40, 7);
            const Tokens tail = prompt_of(5, 100 + i);
            prompt.insert(prompt.end(), tail.begin(), tail.end());
            requests.push_back(simulation.submit(prompt, 6));
        }
        CHECK(simulation.run());
        for (const auto& request : requests) {
            CHECK_EQ(generated(*request), expected(simulation, *request));
        }
        CHECK_EQ(simulation.scheduler.stats().prompt_tokens, 40u + 4 * 5u);
        CHECK_EQ(simulation.decoder.copies, 3);
    }
}

TEST_CASE("scheduler: who waits for another's beginning goes on when that one is cancelled") {
    Simulation simulation;
    const Tokens shared = prompt_of(40, 7);
    const auto first = simulation.submit(shared, 6);
    simulation.step();
    Tokens prompt = shared;
    prompt.push_back(test::byte_token('q'));
    const auto second = simulation.submit(prompt, 6);
    simulation.step();
    first->cancelled = true;
    first->finish("cancelled");
    CHECK(simulation.run());
    CHECK_EQ(generated(*second), expected(simulation, *second));
    CHECK(second->result.cached_tokens > 0);
}

TEST_CASE("scheduler: another conversation with the same beginning stays") {
    test::SimulatedDecoder::Options options;
    options.sequences = 2;
    Simulation simulation(options);
    const Tokens shared = prompt_of(18, 3);
    const auto with_tail = [&](std::size_t size, unsigned seed) {
        Tokens prompt = shared;
        const Tokens tail = prompt_of(size, seed);
        prompt.insert(prompt.end(), tail.begin(), tail.end());
        return prompt;
    };
    const Tokens conversation = with_tail(30, 50);
    simulation.submit(conversation, 1);
    CHECK(simulation.run());
    const auto other = simulation.submit(with_tail(4, 60), 1);
    CHECK(simulation.run());
    CHECK_EQ(other->result.cached_tokens, 18);
    Tokens longer = conversation;
    longer.push_back(test::byte_token('y'));
    const auto same = simulation.submit(longer, 1);
    CHECK(simulation.run());
    CHECK_EQ(same->result.cached_tokens, static_cast<int>(conversation.size()));
}

TEST_CASE("scheduler: a saved prefix is restored, and one that does not fit is dropped") {
    Simulation simulation;
    const Tokens shared = prompt_of(30, 5);
    const auto save = simulation.submit(shared, std::nullopt, RequestKind::save);
    CHECK(simulation.run());
    Simulation other;
    other.scheduler.add_saved_prefix({shared, save->state});
    Tokens prompt = shared;
    prompt.push_back(test::byte_token('z'));
    const auto request = other.submit(prompt, 5);
    CHECK(other.run());
    CHECK_EQ(request->result.cached_tokens, 30);
    CHECK_EQ(generated(*request), expected(other, *request));

    Simulation damaged;
    damaged.scheduler.add_saved_prefix({shared, "nonsense"});
    const auto anyway = damaged.submit(prompt, 5);
    CHECK(damaged.run());
    CHECK_EQ(anyway->result.cached_tokens, 0);
    CHECK_EQ(generated(*anyway), expected(damaged, *anyway));
}

TEST_CASE("scheduler: a full pool sends the newest request back, and it goes on to the same text") {
    test::SimulatedDecoder::Options options;
    options.pool = 80;
    Simulation simulation(options);
    std::vector<std::shared_ptr<Request>> requests;
    for (unsigned i = 0; i < 4; i++) {
        requests.push_back(simulation.submit(prompt_of(20, i), 30));
    }
    CHECK(simulation.run());
    CHECK(simulation.scheduler.stats().requests_preempted > 0);
    for (const auto& request : requests) {
        CHECK_EQ(generated(*request), expected(simulation, *request));
        CHECK_EQ(request->result.finish_reason, "length");
    }
}

TEST_CASE("scheduler: drafts change the number of calls and nothing else") {
    test::SimulatedDecoder::Options options;
    Simulation plain(options);
    options.draft = 5;
    options.batch_size = 64;
    Simulation drafting(options);
    for (auto* simulation : {&plain, &drafting}) {
        const auto request = simulation->submit(prompt_of(10, 1), 40);
        CHECK(simulation->run());
        CHECK_EQ(generated(*request), expected(*simulation, *request));
    }
    CHECK(drafting.decoder.calls < plain.decoder.calls * 3 / 4);
    CHECK(drafting.scheduler.stats().draft_tokens_accepted > 0);
    CHECK(drafting.scheduler.stats().draft_tokens_accepted < drafting.scheduler.stats().draft_tokens);
}

TEST_CASE("scheduler: scores are the log-probabilities of each token after the ones before it") {
    Simulation simulation;
    Tokens prompt = prompt_of(30, 2);
    const Tokens likely = simulation.decoder.continuation(prompt, 3);
    prompt.insert(prompt.end(), likely.begin(), likely.end());
    const auto running = simulation.submit(prompt_of(5, 8), 20);
    const auto request = simulation.submit(prompt, std::nullopt, RequestKind::score);
    CHECK(simulation.run());
    REQUIRE(request->values.size() == prompt.size() - 1);
    const double normal = std::log(std::exp(5.0) + vocabulary().size - 1);
    for (std::size_t i = 0; i < request->values.size(); i++) {
        const bool likely_one = prompt[i + 1] == simulation.decoder.next(Tokens(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(i + 1)));
        CHECK(std::abs(request->values[i] - ((likely_one ? 5.0 : 0.0) - normal)) < 1e-4);
    }
    CHECK_EQ(generated(*running), expected(simulation, *running));
}

TEST_CASE("scheduler: embeddings are pooled over all tokens, beside generation") {
    const Tokens prompt = prompt_of(21, 4);
    for (const auto pooling : {Pooling::none, Pooling::mean, Pooling::cls, Pooling::last}) {
        Simulation simulation;
        const auto running = simulation.submit(prompt_of(5, 8), 20);
        const auto request = simulation.request(prompt, std::nullopt, RequestKind::embed);
        request->embedding = {pooling, false};
        simulation.submit(request);
        CHECK(simulation.run());
        const auto& values = request->values;
        REQUIRE(values.size() == (pooling == Pooling::none ? 2 * prompt.size() : 2));
        const float position = pooling == Pooling::mean ? 11.0f : pooling == Pooling::last ? 21.0f : 1.0f;  // 1 to 21
        CHECK_EQ(values[1], position);
        CHECK_EQ(generated(*running), expected(simulation, *running));
    }
}

TEST_CASE("scheduler: a copy from a sequence that another request is about to get is not made") {
    test::SimulatedDecoder::Options options;
    options.sequences = 3;
    Simulation simulation(options);
    const Tokens kept = prompt_of(50, 1);
    simulation.submit(kept, 1);
    CHECK(simulation.run());
    simulation.submit(prompt_of(3, 2), 1);
    simulation.submit(prompt_of(3, 3), 1);
    CHECK(simulation.run());
    const Tokens saved = prompt_of(40, 4);
    const std::string state(reinterpret_cast<const char*>(saved.data()), saved.size() * sizeof(std::int32_t));
    simulation.scheduler.add_saved_prefix({saved, state});
    // Both come at once: one shares less than half of what is kept, the other gets its sequence and a saved prefix.
    Tokens first(kept.begin(), kept.begin() + 20);
    first.push_back(test::byte_token('0'));
    Tokens second = saved;
    second.push_back(test::byte_token('1'));
    const auto a = simulation.submit(first, 8);
    const auto b = simulation.submit(second, 8);
    const auto c = simulation.submit(second, 8);
    CHECK(simulation.run());
    for (const auto& request : {a, b, c}) {
        CHECK_EQ(generated(*request), expected(simulation, *request));
    }
}

TEST_CASE("scheduler: a score ends in the smallest batch that an engine may have") {
    test::SimulatedDecoder::Options options;
    options.sequences = 2;
    options.batch_size = 2;
    options.micro_batch_size = 2;
    options.score_rows = 0;
    Simulation simulation(options);
    const auto request = simulation.submit(prompt_of(9, 1), std::nullopt, RequestKind::score);
    const auto running = simulation.submit(prompt_of(3, 2), 5);
    CHECK(simulation.run(200));
    CHECK_EQ(request->values.size(), 8u);
    CHECK_EQ(generated(*running), expected(simulation, *running));
}

TEST_CASE("scheduler: drafts leave room for prompts") {
    test::SimulatedDecoder::Options options;
    options.sequences = 3;
    options.draft = 16;
    options.batch_size = 64;
    options.micro_batch_size = 16;
    options.context_size = 512;
    Simulation simulation(options);
    simulation.submit(prompt_of(2, 1), 400);
    simulation.submit(prompt_of(2, 2), 400);
    simulation.step();
    simulation.step();
    const auto late = simulation.submit(prompt_of(80, 3), 1);
    const int before = simulation.steps;
    while (late->generated == 0) {
        simulation.step();
    }
    CHECK(simulation.steps - before <= 12);
    CHECK(simulation.run());
}
