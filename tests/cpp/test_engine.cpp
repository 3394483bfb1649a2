#include "llama_moe/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "child_process.h"
#include "eventually.h"
#include "ggml.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/text.h"
#include "sampler.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;
using test::contains;

namespace {

using Tokens = std::vector<std::int32_t>;

struct Interrupt : std::runtime_error {
    Interrupt() : std::runtime_error("interrupted") {}
};

const std::shared_ptr<Model>& model() {
    static const auto instance = test::load_tiny_model();
    return instance;
}

// One thread, so that tests do not depend on the machine; exact, so that a batch gives what its requests give alone.
EngineOptions options_of(int sequences, int context_size = 256) {
    EngineOptions options;
    options.context_size = context_size;
    options.max_sequences = sequences;
    options.threads = 1;
    options.kv_type = "f32";
    options.flash_attention = "off";
    return options;
}

std::shared_ptr<Engine> make_engine(int sequences, int context_size = 256) {
    return Engine::create(model(), options_of(sequences, context_size));
}

// Prompts so long that computing one takes much longer than the interval of polls.
std::shared_ptr<Engine> make_slow_engine(int sequences = 1) {
    auto options = options_of(sequences, 16 * 1024);
    options.micro_batch_size = 16;
    return Engine::create(model(), options);
}

SamplingOptions greedy(std::optional<int> max_tokens) {
    SamplingOptions sampling;
    sampling.temperature = 0;
    sampling.max_tokens = max_tokens;
    sampling.ignore_eos = true;
    return sampling;
}

// Text of the letters a to e, so that stop strings are found in it.
SamplingOptions letters(std::uint32_t seed, std::optional<int> max_tokens) {
    SamplingOptions sampling;
    sampling.temperature = 5.0f;
    sampling.top_k = 0;
    sampling.top_p = 1.0f;
    sampling.min_p = 0.0f;
    sampling.seed = seed;
    sampling.max_tokens = max_tokens;
    for (int token = 0; token < test::kVocabSize; token++) {
        if (token < test::byte_token('a') || token > test::byte_token('e')) {
            sampling.logit_bias[token] = -std::numeric_limits<float>::infinity();
        }
    }
    return sampling;
}

std::vector<std::int32_t> prompt_of(std::size_t count, int seed = 0) {
    std::vector<std::int32_t> tokens(count);
    for (std::size_t i = 0; i < count; i++) {
        tokens[i] = test::kFirstByte + static_cast<std::int32_t>((i * 37 + static_cast<std::size_t>(seed) * 101) % 256);
    }
    return tokens;
}

struct Output {
    std::vector<std::int32_t> tokens;
    std::string text;
    std::vector<GeneratedToken> pieces;
    GenerationResult result;
};

Output read(Generation& generation) {
    Output output;
    for (bool ended = false; !ended;) {
        auto delivered = generation.take(/*wait=*/true);
        for (auto& token : delivered.tokens) {
            output.tokens.push_back(token.id);
            output.text += token.text;
            output.pieces.push_back(std::move(token));
        }
        ended = delivered.ended;
    }
    output.result = generation.result();
    return output;
}

// Waits for tokens; false at the end.
bool more(Generation& generation, const Poll& poll = {}) {
    return !generation.take(/*wait=*/true, poll).tokens.empty();
}

void read_to_end(Generation& generation) {
    while (more(generation)) {
    }
}

Output generate(Engine& engine, const std::vector<std::int32_t>& prompt, const SamplingOptions& sampling) {
    return read(*engine.submit(prompt, sampling));
}

// The greedy tokens, computed by the low level without an engine.
std::vector<std::int32_t> reference_tokens(const std::vector<std::int32_t>& prompt, int count) {
    const auto context = Context::create(model(), options_of(1));
    std::vector<std::int32_t> tokens;
    auto next = prompt;
    for (int i = 0; i < count; i++) {
        DecodeInput input;
        input.tokens = next;
        auto logits = context->decode(input);
        logits->values[test::kEos] = -std::numeric_limits<float>::infinity();
        next = {argmax(logits->values.data(), test::kVocabSize)};
        tokens.push_back(next.front());
    }
    return tokens;
}

}  // namespace

TEST_CASE("an engine generates what decoding token by token gives") {
    const auto engine = make_engine(1);
    for (int seed = 0; seed < 3; seed++) {
        const auto prompt = prompt_of(20, seed);
        const auto output = generate(*engine, prompt, greedy(30));
        CHECK_EQ(output.tokens, reference_tokens(prompt, 30));
        CHECK_EQ(output.result.finish_reason, "length");
        CHECK_EQ(output.result.prompt_tokens, 20);
        CHECK_EQ(output.result.cached_tokens, 0);
        CHECK_EQ(output.result.completion_tokens, 30);
    }
}

TEST_CASE("a text prompt has its special tokens added and parsed") {
    const auto engine = make_engine(1);
    const auto from_text = read(*engine->submit("ab<s>c", greedy(10)));
    CHECK_EQ(from_text.result.prompt_tokens, 5);
    const auto from_tokens = generate(
        *engine, {test::kBos, test::byte_token('a'), test::byte_token('b'), test::kBos, test::byte_token('c')}, greedy(10));
    CHECK_EQ(from_text.tokens, from_tokens.tokens);
}

TEST_CASE("requests in one batch get what each gets alone") {
    std::vector<std::vector<std::int32_t>> expected;
    for (int i = 0; i < 12; i++) {
        expected.push_back(reference_tokens(prompt_of(static_cast<std::size_t>(3 + i * 7), i), 10 + i));
    }
    for (const int batch_size : {4, 16, 512}) {  // prompts in pieces, beside tokens of others
        auto options = options_of(4);
        options.batch_size = batch_size;
        options.micro_batch_size = 8;
        const auto engine = Engine::create(model(), options);
        std::vector<std::unique_ptr<Generation>> generations;
        for (int i = 0; i < 12; i++) {
            generations.push_back(engine->submit(prompt_of(static_cast<std::size_t>(3 + i * 7), i), greedy(10 + i)));
        }
        for (std::size_t i = 0; i < generations.size(); i++) {
            CHECK_EQ(read(*generations[i]).tokens, expected[i]);
        }
        const auto stats = engine->stats();
        CHECK_EQ(stats.requests_submitted, 12u);
        CHECK_EQ(stats.requests_finished, 12u);
        CHECK_EQ(stats.requests_running, 0u);
        CHECK_EQ(stats.requests_waiting, 0u);
        CHECK_EQ(stats.prompt_tokens, 12u * 3 + 7 * 66);
        CHECK_EQ(stats.generated_tokens, 12u * 10 + 66);
        CHECK(stats.decode_calls > 0 && stats.decode_seconds > 0);
    }
}

TEST_CASE("many threads may use one engine, each with several requests") {
    const auto engine = make_engine(4);
    std::map<int, std::vector<std::int32_t>> expected;
    for (int i = 0; i < 8; i++) {
        expected[i] = reference_tokens(prompt_of(5, i), 12);
    }
    std::atomic<int> checked{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; i++) {
        threads.emplace_back([&, i] {
            for (int round = 0; round < 5; round++) {
                const auto first = engine->submit(prompt_of(5, i), greedy(12));
                const auto abandoned = engine->submit(prompt_of(9, i), greedy(100));
                const auto second = engine->submit(prompt_of(5, 7 - i), greedy(12));
                CHECK_EQ(read(*second).tokens, expected.at(7 - i));
                CHECK_EQ(read(*first).tokens, expected.at(i));
                checked++;
            }
        });
    }
    for (auto& thread : threads) {
        thread.join();
    }
    CHECK_EQ(checked.load(), 40);
    // Those that were given up leave their places when the engine next looks at them.
    CHECK(test::eventually([&] { return engine->stats().requests_finished == 120; }));
    CHECK(test::eventually([&] { return engine->stats().requests_running == 0; }));
    CHECK_EQ(generate(*engine, prompt_of(5, 0), greedy(12)).tokens, expected.at(0));
}

TEST_CASE("a seed decides the tokens, whatever else is in the batch") {
    const auto engine = make_engine(3);
    SamplingOptions sampling;
    sampling.max_tokens = 30;
    sampling.temperature = 2.0f;
    sampling.seed = 11;
    sampling.ignore_eos = true;
    const auto alone = generate(*engine, prompt_of(8), sampling);
    const auto beside = engine->submit(prompt_of(30, 1), greedy(60));
    auto other_seed = sampling;
    other_seed.seed = 12;
    const auto other = engine->submit(prompt_of(8), other_seed);
    const auto again = engine->submit(prompt_of(8), sampling);
    CHECK_EQ(read(*again).tokens, alone.tokens);
    CHECK(read(*other).tokens != alone.tokens);
}

TEST_CASE("an end-of-generation token ends the text and is not part of it") {
    const auto engine = make_engine(1);
    SamplingOptions sampling = greedy(50);
    sampling.ignore_eos = false;
    sampling.logit_bias[test::kEos] = 1000.0f;
    const auto output = generate(*engine, prompt_of(5), sampling);
    CHECK(output.tokens.empty());
    CHECK_EQ(output.result.finish_reason, "stop");
    CHECK_EQ(output.result.completion_tokens, 0);
}

TEST_CASE("max_tokens ends a generation by length") {
    const auto engine = make_engine(1);
    for (const int count : {1, 2, 17}) {
        const auto output = generate(*engine, prompt_of(5), greedy(count));
        CHECK_EQ(output.tokens.size(), static_cast<std::size_t>(count));
        CHECK_EQ(output.result.finish_reason, "length");
        CHECK_EQ(output.result.completion_tokens, count);
    }
}

TEST_CASE("how a generation ended is not changed by cancelling it later") {
    const auto engine = make_engine(1);
    const auto generation = engine->submit(prompt_of(5), greedy(3));
    CHECK_EQ(read(*generation).result.finish_reason, "length");
    generation->cancel();
    CHECK_EQ(generation->result().finish_reason, "length");
    CHECK_EQ(generation->result().completion_tokens, 3);
}

TEST_CASE("a long prompt goes in beside those who generate, one micro-batch a step") {
    auto options = options_of(2, 8 * 1024);
    options.micro_batch_size = 8;
    const auto engine = Engine::create(model(), options);
    const auto running = engine->submit(prompt_of(5), greedy(std::nullopt));
    REQUIRE(more(*running));
    const auto before = engine->stats();
    const auto output = generate(*engine, prompt_of(80, 1), greedy(1));
    const auto after = engine->stats();
    CHECK_EQ(output.tokens, reference_tokens(prompt_of(80, 1), 1));
    CHECK_EQ(after.requests_running, 1u);  // the other was not waited for
    CHECK(after.decode_calls - before.decode_calls >= 10);
    CHECK(after.generated_tokens - before.generated_tokens >= 10);  // nor did it wait
}

TEST_CASE("a full context ends a generation by length, with as many tokens as fit") {
    const auto engine = make_engine(2);
    const auto output = generate(*engine, prompt_of(200), greedy(std::nullopt));
    CHECK_EQ(output.result.finish_reason, "length");
    CHECK_EQ(output.tokens.size(), 57u);  // 56 are decoded into the 256 places, and one more comes of the last
    const auto full = generate(*engine, prompt_of(256), greedy(std::nullopt));
    CHECK_EQ(full.tokens.size(), 1u);
    CHECK_EQ(CHECK_THROWS(ContextFullError, engine->submit(prompt_of(257), greedy(1))),
             "the prompt has 257 tokens; the context holds 256 for each sequence");
}

TEST_CASE("a stop string ends the text where it begins, wherever the tokens' edges are") {
    const auto engine = make_engine(2);
    std::mt19937 random(9);
    for (std::uint32_t seed = 1; seed <= 10; seed++) {
        const auto whole = generate(*engine, prompt_of(6), letters(seed, 80));
        REQUIRE(whole.text.size() == 80);
        auto sampling = letters(seed, 80);
        const std::size_t size = 1 + random() % 4;
        sampling.stop = {"zzz", whole.text.substr(20 + random() % 50, size)};
        const std::size_t expected = whole.text.find(sampling.stop[1]);
        const auto output = generate(*engine, prompt_of(6), sampling);
        CHECK_EQ(output.text, whole.text.substr(0, expected));
        CHECK_EQ(output.result.finish_reason, "stop");
        CHECK_EQ(output.tokens, (std::vector<std::int32_t>{whole.tokens.begin(), whole.tokens.begin() + static_cast<std::ptrdiff_t>(expected)}));
        CHECK_EQ(output.result.completion_tokens, static_cast<int>(expected + size));  // the stop string was generated, too
    }
    auto sampling = letters(1, 80);
    sampling.stop = {"zzz"};
    CHECK_EQ(generate(*engine, prompt_of(6), sampling).text, generate(*engine, prompt_of(6), letters(1, 80)).text);
}

TEST_CASE("text held back for a stop string is given out at the end") {
    const auto engine = make_engine(1);
    const auto whole = generate(*engine, prompt_of(6), letters(3, 20));
    auto sampling = letters(3, 20);
    sampling.stop = {whole.text.substr(15) + "z"};
    const auto output = generate(*engine, prompt_of(6), sampling);
    CHECK_EQ(output.text, whole.text);
    CHECK_EQ(output.tokens, whole.tokens);
    CHECK_EQ(output.result.finish_reason, "length");
}

TEST_CASE("log-probabilities come with their tokens, also with those that were held back") {
    const auto engine = make_engine(1);
    const auto whole = generate(*engine, prompt_of(6), letters(3, 20));
    auto sampling = letters(3, 20);
    sampling.logprobs = 5;
    sampling.stop = {whole.text.substr(3, 2) + "z", "z"};
    const auto output = generate(*engine, prompt_of(6), sampling);
    REQUIRE(output.pieces.size() == 20);

    DecodeInput input;
    input.tokens = prompt_of(6);
    input.tokens.insert(input.tokens.end(), output.tokens.begin(), output.tokens.end() - 1);
    input.outputs = Outputs::mask;
    input.mask.assign(input.tokens.size(), 1);
    std::fill(input.mask.begin(), input.mask.begin() + 5, std::uint8_t{0});
    const auto logits = Context::create(model(), options_of(1))->decode(input);
    for (std::size_t i = 0; i < 20; i++) {
        const auto& piece = output.pieces[i];
        const auto expected = log_probabilities(logits->values.data() + i * logits->columns, test::kVocabSize, piece.id, 5);
        REQUIRE(piece.logprob.has_value());
        CHECK(std::abs(*piece.logprob - expected.logprob) < 1e-3f);
        REQUIRE(piece.top.size() == 5);
        for (std::size_t k = 0; k < 5; k++) {
            CHECK_EQ(piece.top[k].token, expected.top[k].first);
            CHECK(std::abs(piece.top[k].logprob - expected.top[k].second) < 1e-3f);
        }
    }
    for (const auto& piece : whole.pieces) {
        CHECK(!piece.logprob && piece.top.empty());
    }
}

TEST_CASE("text is valid UTF-8 whatever bytes the tokens are") {
    const auto engine = make_engine(1);
    SamplingOptions sampling;
    sampling.temperature = 100.0f;  // any byte
    sampling.top_k = 0;
    sampling.top_p = 1.0f;
    sampling.min_p = 0.0f;
    sampling.seed = 5;
    sampling.ignore_eos = true;
    sampling.max_tokens = 200;
    const auto output = generate(*engine, prompt_of(5), sampling);
    CHECK_EQ(output.tokens.size(), 200u);
    std::string bytes;
    for (const auto token : output.tokens) {
        bytes += model()->token_bytes(token, false);
    }
    Utf8Assembler utf8;
    std::string expected = utf8.push(bytes);
    expected += utf8.finish();
    CHECK_EQ(output.text, expected);
    CHECK(contains(output.text, "\xEF\xBF\xBD"));
}

TEST_CASE("a request that cannot be meant is refused at once") {
    const auto engine = make_engine(1);
    CHECK_EQ(CHECK_THROWS(InvalidOptionError, engine->submit(Tokens{}, greedy(1))), "the prompt is empty; give at least one token");
    CHECK(contains(CHECK_THROWS(InvalidOptionError, engine->submit(Tokens{5, -1}, greedy(1))), "prompt[1] is -1"));
    CHECK(contains(CHECK_THROWS(InvalidOptionError, engine->submit(Tokens{test::kVocabSize}, greedy(1))), "prompt[0] is "));
    CHECK_THROWS(InvalidOptionError, engine->submit(Tokens{5}, greedy(0)));
    auto sampling = greedy(1);
    sampling.logit_bias[test::kVocabSize] = 1.0f;
    CHECK_THROWS(InvalidOptionError, engine->submit(Tokens{5}, sampling));
    CHECK_EQ(engine->stats().requests_submitted, 0u);
}

TEST_CASE("an engine refuses options that cannot be") {
    auto options = options_of(4);
    options.batch_size = 3;
    const auto message = CHECK_THROWS(InvalidOptionError, Engine::create(model(), options));
    CHECK_EQ(message, "batch_size is 3; an engine needs at least one token for each of its 4 sequences");
    options = options_of(1);
    options.kv_type = "f17";
    CHECK_THROWS(InvalidOptionError, Engine::create(model(), options));
    options = options_of(1, 1'500'000'000);
    CHECK_THROWS(DoesNotFitError, Engine::create(model(), options));
    CHECK_EQ(generate(*make_engine(1), prompt_of(3), greedy(2)).tokens.size(), 2u);
}

TEST_CASE("cancel in the middle ends a generation, keeps the others and frees its place") {
    const auto engine = make_engine(2);
    const auto first = engine->submit(prompt_of(5), greedy(std::nullopt));
    const auto second = engine->submit(prompt_of(5, 1), greedy(60));
    const auto waiting = engine->submit(prompt_of(5, 2), greedy(5));
    REQUIRE(more(*first));
    CHECK_THROWS(Error, second->result());  // still running
    first->cancel();
    first->cancel();
    CHECK(!more(*first));
    CHECK_EQ(first->result().finish_reason, "cancelled");
    CHECK(first->result().completion_tokens >= 1);
    CHECK_EQ(read(*waiting).tokens, reference_tokens(prompt_of(5, 2), 5));
    CHECK_EQ(read(*second).tokens, reference_tokens(prompt_of(5, 1), 60));
}

TEST_CASE("a request that waits can be cancelled before it starts") {
    const auto engine = make_slow_engine();
    const auto running = engine->submit(prompt_of(12'000), greedy(1));
    REQUIRE(test::eventually([&] { return engine->stats().requests_running == 1; }));
    const auto waiting = engine->submit(prompt_of(5), greedy(5));
    waiting->cancel();
    CHECK(!more(*waiting));
    CHECK_EQ(waiting->result().finish_reason, "cancelled");
    CHECK_EQ(waiting->result().completion_tokens, 0);
    CHECK_EQ(engine->stats().requests_waiting, 0u);
    running->cancel();
}

TEST_CASE("cancel stops a long prompt in its middle, and the engine goes on") {
    const auto engine = make_slow_engine();
    const auto expected = generate(*engine, prompt_of(5), greedy(5)).tokens;
    const auto before = engine->stats();
    const auto generation = engine->submit(prompt_of(15'000), greedy(5));
    REQUIRE(test::eventually([&] { return engine->stats().requests_running == 1; }));
    generation->cancel();
    CHECK(!more(*generation));
    CHECK_EQ(generate(*engine, prompt_of(5), greedy(5)).tokens, expected);
    CHECK(engine->stats().prompt_tokens < before.prompt_tokens + 15'000);
}

TEST_CASE("a poll that throws leaves the wait and nothing else") {
    const auto engine = make_slow_engine();
    const auto generation = engine->submit(prompt_of(2'500), greedy(2));
    CHECK_THROWS(Interrupt, more(*generation, [] { throw Interrupt(); }));
    CHECK_EQ(read(*generation).tokens.size(), 2u);
}

TEST_CASE("dropping a generation cancels it") {
    const int generations = live_objects().generations;
    const auto engine = make_engine(1);
    auto generation = engine->submit(prompt_of(5), greedy(std::nullopt));
    CHECK_EQ(live_objects().generations, generations + 1);
    more(*generation);
    generation.reset();
    CHECK_EQ(live_objects().generations, generations);
    CHECK_EQ(generate(*engine, prompt_of(5), greedy(3)).tokens.size(), 3u);
    CHECK_EQ(engine->stats().requests_finished, 2u);
}

TEST_CASE("close cancels what runs and what waits, and later use is a ClosedError") {
    const int engines = live_objects().engines;
    auto engine = make_engine(2, 8 * 1024);
    const auto first = engine->submit(prompt_of(5), greedy(std::nullopt));
    const auto second = engine->submit(prompt_of(5, 1), greedy(std::nullopt));
    const auto waiting = engine->submit(prompt_of(5, 2), greedy(5));
    REQUIRE(more(*first));
    CHECK(!engine->closed());
    engine->close();
    engine->close();
    CHECK(engine->closed());
    for (auto* generation : {first.get(), second.get(), waiting.get()}) {
        read_to_end(*generation);
        CHECK_EQ(generation->result().finish_reason, "cancelled");
    }
    const auto stats = engine->stats();
    CHECK_EQ(stats.requests_running, 0u);
    CHECK_EQ(stats.requests_waiting, 0u);
    CHECK_EQ(stats.requests_finished, stats.requests_submitted);
    CHECK_EQ(CHECK_THROWS(ClosedError, engine->submit(prompt_of(5), greedy(1))), "the engine is closed");
    CHECK_THROWS(ClosedError, engine->submit("text", greedy(1)));
    CHECK_THROWS(ClosedError, engine->memory());
    CHECK_THROWS(ClosedError, engine->breakdown());
    first->cancel();  // no harm
    engine.reset();
    CHECK_EQ(live_objects().engines, engines);
}

TEST_CASE("close stops a long prompt in its middle") {
    const auto engine = make_slow_engine();
    const auto generation = engine->submit(prompt_of(15'000), greedy(5));
    REQUIRE(test::eventually([&] { return engine->stats().requests_running == 1; }));
    engine->close();
    CHECK(!more(*generation));
    CHECK_EQ(generation->result().finish_reason, "cancelled");
    CHECK(engine->stats().prompt_tokens < 15'000);
}

TEST_CASE("close from another thread wakes who waits for a token") {
    const auto engine = make_slow_engine();
    const auto generation = engine->submit(prompt_of(15'000), greedy(5));
    std::promise<void> waits;
    std::thread reader([&] {
        bool told = false;
        CHECK(!more(*generation, [&] {
            if (!std::exchange(told, true)) {
                waits.set_value();
            }
        }));
    });
    waits.get_future().wait();
    engine->close();
    reader.join();
}

TEST_CASE("many threads may submit, cancel and close at the same time") {
    for (int round = 0; round < 10; round++) {
        const auto engine = make_engine(2);
        std::atomic<int> ended{0};
        std::vector<std::thread> threads;
        for (int i = 0; i < 6; i++) {
            threads.emplace_back([&, i] {
                try {
                    for (int k = 0; k < 100; k++) {
                        const auto generation = engine->submit(prompt_of(4, i), greedy(20));
                        more(*generation);
                        if (k % 2 == 0) {
                            generation->cancel();
                        }
                        read_to_end(*generation);
                        generation->result();
                        if (i == 0 && k == round) {
                            engine->close();
                        }
                    }
                } catch (const ClosedError&) {
                    ended++;
                }
            });
        }
        for (auto& thread : threads) {
            thread.join();
        }
        CHECK_EQ(ended.load(), 6);
    }
}

TEST_CASE("a generation outlives its engine object") {
    auto engine = make_engine(1);
    auto generation = engine->submit(prompt_of(5), greedy(std::nullopt));
    more(*generation);
    engine.reset();
    read_to_end(*generation);
    CHECK_EQ(generation->result().finish_reason, "cancelled");
}

TEST_CASE("closing a model closes its engines and frees its weights") {
    const int models = live_objects().models;
    const int engines = live_objects().engines;
    auto own_model = test::load_tiny_model();
    const std::weak_ptr<LoadedModel> loaded = own_model->acquire();
    auto engine = Engine::create(own_model, options_of(2));
    auto sampling = greedy(std::nullopt);
    sampling.dry_multiplier = 1.0f;  // a sampler that was made with the vocabulary
    auto generation = engine->submit(prompt_of(5), sampling);
    REQUIRE(more(*generation));
    own_model->close();
    CHECK(engine->closed());
    CHECK(loaded.expired());  // although the engine and the generation are still there
    read_to_end(*generation);
    CHECK_EQ(generation->result().finish_reason, "cancelled");
    CHECK_THROWS(ClosedError, engine->submit(prompt_of(5), greedy(1)));
    generation.reset();
    engine.reset();
    own_model.reset();
    CHECK_EQ(live_objects().models, models);
    CHECK_EQ(live_objects().engines, engines);
}

TEST_CASE("an engine keeps its model alive") {
    auto own_model = test::load_tiny_model();
    const auto engine = Engine::create(own_model, options_of(1));
    own_model.reset();
    CHECK_EQ(read(*engine->submit("abc", greedy(4))).tokens.size(), 4u);
}

TEST_CASE("an engine's memory agrees with llama.cpp, also while it generates") {
    const auto engine = make_engine(2);
    const auto generation = engine->submit(prompt_of(5), greedy(std::nullopt));
    std::map<std::string, std::uint64_t> roles;
    for (const auto& row : engine->memory()) {
        CHECK_EQ(row.device, "CPU");
        roles[row.role] += row.bytes;
    }
    std::map<std::string, std::uint64_t> kinds;
    for (const auto& row : engine->breakdown()) {
        kinds[row.kind] += row.bytes;
    }
    CHECK(roles.at("kv_cache") > 0 && roles.at("experts") > 0 && roles.at("weights") > 0);
    CHECK_EQ(roles.at("kv_cache"), kinds.at("context"));
    CHECK_EQ(roles.at("compute"), kinds.at("compute"));
}

TEST_CASE("timings add up") {
    const auto engine = make_engine(1);
    const auto begin = std::chrono::steady_clock::now();
    const auto result = generate(*engine, prompt_of(50), greedy(20)).result;
    const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    CHECK(result.queue_seconds >= 0 && result.prompt_seconds > 0 && result.decode_seconds > 0);
    CHECK(result.queue_seconds + result.prompt_seconds + result.decode_seconds <= wall);
    CHECK(std::abs(result.time_to_first_token - result.queue_seconds - result.prompt_seconds) < 1e-6);
}

TEST_CASE("engines come and go without leaving anything") {
    const int engines = live_objects().engines;
    const int generations = live_objects().generations;
    for (int i = 0; i < 10; i++) {
        const auto engine = make_engine(2);
        const auto generation = engine->submit(prompt_of(5), greedy(3));
        more(*generation);
    }
    CHECK_EQ(live_objects().engines, engines);
    CHECK_EQ(live_objects().generations, generations);
}

ISOLATED_TEST_CASE("an engine on an accelerator gives the CPU's tokens for every placement") {
    const auto expected = generate(*make_engine(1), prompt_of(20), greedy(30)).tokens;
    test::Worker worker;
    add_rpc_device(worker.endpoint());
    using Kind = PlacementPolicy::Kind;
    for (const auto kind : {Kind::gpu, Kind::cpu, Kind::cpu_first, Kind::fit}) {
        PlacementPolicy policy;
        policy.kind = kind;
        policy.count = 1;
        const auto engine = Engine::create(Model::load(test::tiny_model_file(), {}, policy), options_of(2));
        CHECK_EQ(generate(*engine, prompt_of(20), greedy(30)).tokens, expected);
    }
}

ISOLATED_TEST_CASE("when a worker dies its engine fails, and the process and other engines go on") {
    const auto other = make_engine(1);
    const auto expected = generate(*other, prompt_of(20), greedy(30)).tokens;
    test::Worker worker;
    add_rpc_device(worker.endpoint());
    PlacementPolicy policy;
    policy.kind = PlacementPolicy::Kind::cpu;
    const auto remote_model = Model::load(test::tiny_model_file(), {}, policy);
    const auto engine = Engine::create(remote_model, options_of(2, 8 * 1024));
    const auto running = engine->submit(prompt_of(5), greedy(std::nullopt));
    const auto beside = engine->submit(prompt_of(5, 1), greedy(std::nullopt));
    REQUIRE(more(*running));
    worker.kill();
    for (auto* generation : {running.get(), beside.get()}) {
        CHECK_THROWS(DecodeError, read_to_end(*generation));
    }
    CHECK_THROWS(DecodeError, engine->submit(prompt_of(5), greedy(1)));
    CHECK_EQ(generate(*other, prompt_of(20), greedy(30)).tokens, expected);
    engine->close();
    remote_model->close();
    CHECK_EQ(generate(*make_engine(1), prompt_of(20), greedy(30)).tokens, expected);
}

ISOLATED_TEST_CASE("a worker that died is not used again, and engines on another worker go on") {
    test::Worker dying;
    test::Worker healthy;
    add_rpc_device(dying.endpoint());
    add_rpc_device(healthy.endpoint());
    const auto engine_on = [](const std::string& device, int context_size) {
        ModelOptions options;
        options.devices = std::vector<std::string>{device};
        PlacementPolicy policy;
        policy.kind = PlacementPolicy::Kind::gpu;
        return Engine::create(Model::load(test::tiny_model_file(), options, policy), options_of(1, context_size));
    };
    const auto other = engine_on("RPC1", 8 * 1024);
    const auto expected = generate(*other, prompt_of(20), greedy(30)).tokens;
    const auto engine = engine_on("RPC0", 8 * 1024);
    const auto failing = engine->submit(prompt_of(5), greedy(std::nullopt));
    const auto running = other->submit(prompt_of(20), greedy(30));
    REQUIRE(more(*failing));
    dying.kill();
    CHECK_THROWS(DecodeError, read_to_end(*failing));
    CHECK_EQ(read(*running).tokens, expected);
    CHECK_EQ(generate(*other, prompt_of(20), greedy(30)).tokens, expected);
    for (const auto& device : devices()) {  // asking the dead one for its memory would never return
        CHECK_EQ(device.memory_total > 0, device.name != "RPC0");
    }
    CHECK(contains(CHECK_THROWS(Error, add_rpc_device(dying.endpoint())), "failed earlier"));
    CHECK_EQ(generate(*engine_on("RPC1", 256), prompt_of(20), greedy(30)).tokens, expected);
}

ISOLATED_TEST_CASE("an engine that was given up stays given up, although its call returns") {
    auto options = options_of(1, 16 * 1024);
    options.batch_size = options.micro_batch_size = 12 * 1024;  // one call for all of the prompt, which takes seconds
    const auto engine = Engine::create(model(), options);
    const auto generation = engine->submit(prompt_of(12'000), greedy(5));
    // Again each time, as the call may not have begun at the first.
    const auto abort_elsewhere = [] { std::thread([] { GGML_ABORT("another device died"); }).detach(); };
    CHECK(contains(CHECK_THROWS(DecodeError, more(*generation, abort_elsewhere)), "another device died"));
    CHECK_THROWS(DecodeError, engine->submit(prompt_of(5), greedy(1)));
    generation->cancel();  // the call returns
    engine->close();
    CHECK_EQ(engine->stats().requests_running, 0u);
    CHECK_EQ(engine->stats().requests_finished, 1u);  // once
    CHECK_EQ(generate(*make_engine(1), prompt_of(5), greedy(3)).tokens.size(), 3u);
}

ISOLATED_TEST_CASE("a context whose worker died fails, closes, and the process goes on") {
    test::Worker worker;
    add_rpc_device(worker.endpoint());
    PlacementPolicy policy;
    policy.kind = PlacementPolicy::Kind::gpu;
    const auto remote_model = Model::load(test::tiny_model_file(), {}, policy);
    const auto context = Context::create(remote_model, options_of(1));
    DecodeInput input;
    input.tokens = prompt_of(5);
    context->decode(input);
    worker.kill();
    CHECK_THROWS(DecodeError, context->decode(input));
    CHECK_THROWS(DecodeError, context->decode(input));
    context->close();
    remote_model->close();
    CHECK_EQ(generate(*make_engine(1), prompt_of(20), greedy(30)).tokens.size(), 30u);
}
