#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>

#include "llama-cpp.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "native_thread.h"
#include "sampler.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr auto kVocabulary = static_cast<std::size_t>(test::kVocabSize);
constexpr int kContextSize = 256;

// The tiny model's vocabulary, without its weights.
const SamplingVocabulary& vocabulary() {
    static const llama_model_ptr model = [] {
        start_backend();
        llama_model_params params = llama_model_default_params();
        params.vocab_only = true;
        return llama_model_ptr(llama_model_load_from_file(test::tiny_model_file().c_str(), params));
    }();
    static const SamplingVocabulary instance(model.get());
    return instance;
}

Sampler make_sampler(const SamplingOptions& options) {
    return Sampler(options, vocabulary(), kContextSize);
}

// What remains of the defaults is plain softmax sampling at the temperature.
SamplingOptions plain(float temperature) {
    SamplingOptions options;
    options.temperature = temperature;
    options.top_k = 0;
    options.top_p = 1.0f;
    options.min_p = 0.0f;
    options.seed = 1;
    return options;
}

std::vector<float> random_logits(unsigned seed) {
    std::mt19937 random(seed);
    std::vector<float> logits(kVocabulary);
    for (auto& logit : logits) {
        logit = static_cast<float>(random() % 10'000) / 1000.0f;
    }
    return logits;
}

// All others far below.
std::vector<float> logits_of(const std::vector<std::pair<int, float>>& values) {
    std::vector<float> logits(kVocabulary, -100.0f);
    for (const auto& [token, value] : values) {
        logits[static_cast<std::size_t>(token)] = value;
    }
    return logits;
}

std::set<int> sampled(const SamplingOptions& options, const std::vector<float>& logits, int count = 300) {
    auto sampler = make_sampler(options);
    std::set<int> tokens;
    for (int i = 0; i < count; i++) {
        tokens.insert(sampler.sample(logits.data()));
    }
    return tokens;
}

template <typename Change>
void check_invalid(const char* name, Change change) {
    SamplingOptions options;
    change(options);
    const std::string message = CHECK_THROWS(InvalidOptionError, options.validate());
    if (message.find(name) == std::string::npos) {
        test::fail(__FILE__, __LINE__, std::string(name) + " is not named by: " + message);
    }
}

}  // namespace

TEST_CASE("argmax is the first of the largest values, whatever the count") {
    std::mt19937 random(5);
    for (int count = 1; count < 70; count++) {
        for (int round = 0; round < 20; round++) {
            std::vector<float> values(static_cast<std::size_t>(count));
            for (auto& value : values) {
                value = static_cast<float>(static_cast<int>(random() % 9) - 8);
            }
            std::int32_t expected = 0;
            for (std::int32_t i = 1; i < count; i++) {
                expected = values[static_cast<std::size_t>(i)] > values[static_cast<std::size_t>(expected)] ? i : expected;
            }
            CHECK_EQ(argmax(values.data(), count), expected);
        }
    }
}

TEST_CASE("argmax ignores NaN beside numbers and refuses NaN alone") {
    std::vector<float> values(40, kNaN);
    CHECK_THROWS(DecodeError, argmax(values.data(), 40));
    CHECK_THROWS(DecodeError, argmax(values.data(), 3));
    for (const std::size_t at : {std::size_t{0}, std::size_t{17}, std::size_t{39}}) {
        auto with_number = values;
        with_number[at] = -5.0f;
        CHECK_EQ(argmax(with_number.data(), 40), static_cast<std::int32_t>(at));
    }
    const std::vector<float> nothing(20, -kInfinity);
    CHECK_EQ(argmax(nothing.data(), 20), 0);
}

TEST_CASE("log_probabilities agrees with the softmax in long double") {
    for (unsigned seed = 0; seed < 50; seed++) {
        auto logits = random_logits(seed);
        for (auto& logit : logits) {
            logit = logit * 4.0f - 20.0f;
        }
        logits[7] = -kInfinity;
        long double sum = 0;
        for (const float logit : logits) {
            sum += std::exp(static_cast<long double>(logit));
        }
        const auto expected = [&](std::int32_t token) { return static_cast<long double>(logits[static_cast<std::size_t>(token)]) - std::log(sum); };
        const auto token = static_cast<std::int32_t>(100 + seed);
        const auto result = log_probabilities(logits.data(), test::kVocabSize, token, 10);
        CHECK(std::abs(static_cast<long double>(result.logprob) - expected(token)) < 1e-5L);
        REQUIRE(result.top.size() == 10);
        auto sorted = logits;
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        for (std::size_t i = 0; i < result.top.size(); i++) {
            const auto& [id, logprob] = result.top[i];
            CHECK_EQ(logits[static_cast<std::size_t>(id)], sorted[i]);
            CHECK(std::abs(static_cast<long double>(logprob) - expected(id)) < 1e-5L);
        }
    }
}

TEST_CASE("log_probabilities survives logits far from zero") {
    const std::vector<float> logits = {3e4f, 3e4f, -3e4f};
    const auto result = log_probabilities(logits.data(), 3, 0, 3);
    CHECK(std::abs(result.logprob + std::log(2.0f)) < 1e-2f);  // floats near 3e4 are 2e-3 apart
    CHECK(result.top.at(2).second < -5e4f);
}

TEST_CASE("log_probabilities orders equal tokens by number and gives no more than there are") {
    const std::vector<float> logits = {1, 2, 2, 0, 2};
    const auto result = log_probabilities(logits.data(), 5, 3, 100);
    std::vector<std::int32_t> order;
    for (const auto& [id, logprob] : result.top) {
        order.push_back(id);
    }
    CHECK_EQ(order, (std::vector<std::int32_t>{1, 2, 4, 0, 3}));
    CHECK(log_probabilities(logits.data(), 5, 3, 0).top.empty());
}

TEST_CASE("SamplingOptions refuses what it cannot mean, and names it") {
    SamplingOptions().validate();
    check_invalid("max_tokens", [](auto& o) { o.max_tokens = 0; });
    check_invalid("temperature", [](auto& o) { o.temperature = -0.1f; });
    check_invalid("temperature", [](auto& o) { o.temperature = kNaN; });
    check_invalid("temperature", [](auto& o) { o.temperature = kInfinity; });
    check_invalid("top_k", [](auto& o) { o.top_k = -1; });
    check_invalid("top_p", [](auto& o) { o.top_p = 0; });
    check_invalid("top_p", [](auto& o) { o.top_p = 1.5f; });
    check_invalid("min_p", [](auto& o) { o.min_p = -0.5f; });
    check_invalid("min_p", [](auto& o) { o.min_p = 1.5f; });
    check_invalid("typical_p", [](auto& o) { o.typical_p = 0; });
    check_invalid("top_n_sigma", [](auto& o) { o.top_n_sigma = kNaN; });
    check_invalid("repeat_penalty", [](auto& o) { o.repeat_penalty = 0; });
    check_invalid("presence_penalty", [](auto& o) { o.presence_penalty = kInfinity; });
    check_invalid("frequency_penalty", [](auto& o) { o.frequency_penalty = kNaN; });
    check_invalid("penalty_window", [](auto& o) { o.penalty_window = -2; });
    check_invalid("xtc_probability", [](auto& o) { o.xtc_probability = 2; });
    check_invalid("xtc_threshold", [](auto& o) { o.xtc_threshold = -1; });
    check_invalid("dry_multiplier", [](auto& o) { o.dry_multiplier = -1; });
    check_invalid("dry_base", [](auto& o) { o.dry_base = 0.5f; });
    check_invalid("dry_allowed_length", [](auto& o) { o.dry_allowed_length = -1; });
    check_invalid("dry_penalty_window", [](auto& o) { o.dry_penalty_window = -2; });
    check_invalid("mirostat", [](auto& o) { o.mirostat = 3; });
    check_invalid("mirostat_tau", [](auto& o) { o.mirostat_tau = 0; });
    check_invalid("dynatemp_range", [](auto& o) { o.dynatemp_range = -1; });
    check_invalid("dynatemp_exponent", [](auto& o) { o.dynatemp_exponent = 0; });
    check_invalid("min_keep", [](auto& o) { o.min_keep = -1; });
    check_invalid("adaptive_target", [](auto& o) { o.adaptive_target = 1.5f; });
    check_invalid("adaptive_target", [](auto& o) { o.adaptive_target = 0.5f, o.mirostat = 2; });
    check_invalid("adaptive_decay", [](auto& o) { o.adaptive_decay = 1; });
    check_invalid("json_schema", [](auto& o) { o.grammar = "root ::= .", o.json_schema = "{}"; });
    check_invalid("mirostat_eta", [](auto& o) { o.mirostat_eta = 0; });
    check_invalid("logprobs", [](auto& o) { o.logprobs = -1; });
    check_invalid("logprobs", [](auto& o) { o.logprobs = 101; });
    check_invalid("stop", [](auto& o) { o.stop = {"x", ""}; });
    check_invalid("logit_bias[4]", [](auto& o) { o.logit_bias[4] = kNaN; });
    check_invalid("logit_bias[4]", [](auto& o) { o.logit_bias[4] = kInfinity; });
    SamplingOptions banned;
    banned.logit_bias[4] = -kInfinity;
    banned.validate();
}

TEST_CASE("an error of SamplingOptions gives the value and what would be right") {
    SamplingOptions options;
    options.temperature = -0.5f;
    CHECK_EQ(CHECK_THROWS(InvalidOptionError, options.validate()), "temperature is -0.5; it must be 0 (greedy) or more");
}

TEST_CASE("the vocabulary's end-of-generation tokens are known to sampling") {
    CHECK_EQ(vocabulary().size, test::kVocabSize);
    CHECK_EQ(vocabulary().end_tokens, std::vector<std::int32_t>{test::kEos});
}

TEST_CASE("temperature 0 is the most likely token, with and without a sampler chain") {
    SamplingOptions greedy;
    greedy.temperature = 0;
    auto with_chain = greedy;
    with_chain.logit_bias[0] = -1.0f;
    auto sampler = make_sampler(greedy);
    auto chained = make_sampler(with_chain);
    for (unsigned seed = 0; seed < 20; seed++) {
        auto logits = random_logits(seed);
        logits[0] = -50;
        CHECK_EQ(sampler.sample(logits.data()), argmax(logits.data(), test::kVocabSize));
        CHECK_EQ(chained.sample(logits.data()), argmax(logits.data(), test::kVocabSize));
    }
}

TEST_CASE("logit_bias moves the choice and names a token that is not there") {
    SamplingOptions options;
    options.temperature = 0;
    options.logit_bias = {{40, 3.0f}, {30, -kInfinity}};
    const auto logits = logits_of({{30, 9.0f}, {40, 4.0f}, {50, 6.0f}});
    CHECK_EQ(make_sampler(options).sample(logits.data()), 40);
    for (const int token : {-1, test::kVocabSize}) {
        SamplingOptions unknown;
        unknown.logit_bias[token] = 1.0f;
        const auto message = CHECK_THROWS(InvalidOptionError, make_sampler(unknown));
        CHECK_EQ(message, "logit_bias names token " + std::to_string(token) + "; the vocabulary has the tokens 0 to " + std::to_string(test::kVocabSize - 1));
    }
}

TEST_CASE("ignore_eos never chooses an end-of-generation token") {
    SamplingOptions options;
    const auto logits = logits_of({{test::kEos, 9.0f}, {50, 1.0f}});
    for (const float temperature : {0.0f, 1.0f}) {
        options.temperature = temperature;
        options.ignore_eos = false;
        CHECK_EQ(make_sampler(options).sample(logits.data()), test::kEos);
        options.ignore_eos = true;
        CHECK_EQ(make_sampler(options).sample(logits.data()), 50);
    }
}

TEST_CASE("sampling follows softmax at the temperature") {
    // With T = 2, logits 4, 2 and 0 have the probabilities e^2, e^1 and e^0 over their sum.
    const auto logits = logits_of({{10, 4.0f}, {20, 2.0f}, {30, 0.0f}});
    auto sampler = make_sampler(plain(2.0f));
    constexpr int kDraws = 20'000;
    std::vector<int> counts(kVocabulary);
    for (int i = 0; i < kDraws; i++) {
        counts[static_cast<std::size_t>(sampler.sample(logits.data()))]++;
    }
    const double sum = std::exp(2.0) + std::exp(1.0) + 1.0;
    const std::vector<std::pair<std::size_t, double>> expected = {{10, std::exp(2.0) / sum}, {20, std::exp(1.0) / sum}, {30, 1.0 / sum}};
    for (const auto& [token, probability] : expected) {
        const double share = static_cast<double>(counts[token]) / kDraws;
        const double deviation = std::sqrt(probability * (1 - probability) / kDraws);
        CHECK(std::abs(share - probability) < 4 * deviation);
    }
}

TEST_CASE("a seed decides the tokens, and no seed is another one each time") {
    const auto run = [](std::optional<std::uint32_t> seed) {
        auto options = plain(3.0f);
        options.seed = seed;
        auto sampler = make_sampler(options);
        std::vector<std::int32_t> tokens;
        for (unsigned i = 0; i < 40; i++) {
            tokens.push_back(sampler.sample(random_logits(i).data()));
        }
        return tokens;
    };
    CHECK_EQ(run(3), run(3));
    CHECK(run(3) != run(4));
    CHECK(run(std::nullopt) != run(std::nullopt));
}

TEST_CASE("top_k, top_p, min_p and top_n_sigma keep the candidates they are defined to keep") {
    // Probabilities of about 0.5, 0.25, 0.125, ...
    const auto logit = [](int i) { return static_cast<float>(-std::log(2.0) * i); };
    const auto logits = logits_of({{10, logit(1)}, {20, logit(2)}, {30, logit(3)}, {40, logit(4)}, {50, logit(5)}});
    CHECK_EQ(sampled(plain(1.0f), logits).size(), 5u);

    auto options = plain(1.0f);
    options.top_k = 2;
    CHECK(sampled(options, logits) == (std::set<int>{10, 20}));

    options = plain(1.0f);
    options.top_p = 0.7f;
    CHECK(sampled(options, logits) == (std::set<int>{10, 20}));

    options = plain(1.0f);
    options.min_p = 0.2f;  // of the best candidate's 0.5
    CHECK(sampled(options, logits) == (std::set<int>{10, 20, 30}));

    options = plain(1.0f);
    // All logits of the vocabulary deviate by about 13.6, the 254 at -100 included; those of 10 and 20 are 0.69 apart.
    options.top_n_sigma = 0.07f;
    CHECK(sampled(options, logits) == (std::set<int>{10, 20}));
}

TEST_CASE("xtc leaves out the most likely tokens, all but the last above the threshold") {
    const auto logits = logits_of({{10, std::log(0.5f)}, {20, std::log(0.3f)}, {30, std::log(0.2f)}});
    auto options = plain(1.0f);
    options.xtc_probability = 1.0f;
    options.xtc_threshold = 0.25f;
    CHECK(sampled(options, logits) == (std::set<int>{20, 30}));
}

TEST_CASE("penalties count the prompt and what was generated, within the window") {
    const auto logits = logits_of({{10, 6.0f}, {20, 5.0f}, {30, 4.0f}});
    SamplingOptions options;
    options.temperature = 0;
    options.presence_penalty = 1.5f;
    auto sampler = make_sampler(options);
    sampler.accept_prompt({10});
    CHECK_EQ(sampler.sample(logits.data()), 20);  // 10 is at 4.5
    CHECK_EQ(sampler.sample(logits.data()), 10);  // 20 is at 3.5

    options.presence_penalty = 0;
    options.repeat_penalty = 2.0f;
    auto repeat = make_sampler(options);
    repeat.accept_prompt({10});
    CHECK_EQ(repeat.sample(logits.data()), 20);  // 10 is at 3

    options.penalty_window = 0;
    CHECK_EQ(make_sampler(options).sample(logits.data()), 10);
    options.penalty_window = 2;
    auto forgetful = make_sampler(options);
    forgetful.accept_prompt({10, 20, 200, 201});
    CHECK_EQ(forgetful.sample(logits.data()), 10);
    options.penalty_window = -1;
    auto whole = make_sampler(options);
    whole.accept_prompt({10, 20, 200, 201});
    CHECK_EQ(whole.sample(logits.data()), 30);
}

TEST_CASE("dry does not go on with a repeated sequence") {
    const auto a = test::byte_token('a');
    const auto b = test::byte_token('b');
    const auto c = test::byte_token('c');
    const auto logits = logits_of({{c, 6.0f}, {a, 5.0f}});
    SamplingOptions options;
    options.temperature = 0;
    options.dry_multiplier = 5.0f;
    auto sampler = make_sampler(options);
    sampler.accept_prompt({a, b, c, a, b});  // "abc" began again
    CHECK_EQ(sampler.sample(logits.data()), a);
    options.dry_multiplier = 0;
    auto off = make_sampler(options);
    off.accept_prompt({a, b, c, a, b});
    CHECK_EQ(off.sample(logits.data()), c);
}

TEST_CASE("both versions of mirostat choose by their seed") {
    for (const int version : {1, 2}) {
        auto options = plain(1.0f);
        options.mirostat = version;
        auto first = make_sampler(options);
        auto second = make_sampler(options);
        std::set<std::int32_t> tokens;
        for (unsigned i = 0; i < 30; i++) {
            const auto logits = random_logits(i);
            const auto token = first.sample(logits.data());
            CHECK_EQ(second.sample(logits.data()), token);
            tokens.insert(token);
        }
        CHECK(tokens.size() > 5);
    }
}

TEST_CASE("logits that are all NaN are an error, not a token") {
    const std::vector<float> logits(kVocabulary, kNaN);
    for (const float temperature : {0.0f, 1.0f}) {
        SamplingOptions options;
        options.temperature = temperature;
        const NativeScope scope;
        CHECK_THROWS(Error, make_sampler(options).sample(logits.data()));
    }
}

namespace {

// llama.cpp's chain for the same options over all candidates, with nothing selected before it.
std::int32_t choose_by_full_chain(const SamplingOptions& options, const std::vector<float>& logits, const std::vector<std::int32_t>& prompt) {
    auto params = llama_sampler_chain_default_params();
    const llama_sampler_ptr chain(llama_sampler_chain_init(params));
    const auto add = [&](llama_sampler* sampler) { llama_sampler_chain_add(chain.get(), sampler); };
    std::vector<llama_logit_bias> biases;
    for (const auto& [token, bias] : options.logit_bias) {
        biases.push_back({token, bias});
    }
    const auto size = static_cast<std::int32_t>(logits.size());
    add(llama_sampler_init_logit_bias(size, static_cast<std::int32_t>(biases.size()), biases.data()));
    add(llama_sampler_init_penalties(size, options.penalty_window, options.repeat_penalty, options.frequency_penalty, options.presence_penalty));
    if (options.dry_multiplier > 0) {
        std::vector<const char*> breakers = {"\n"};
        add(llama_sampler_init_dry(vocabulary().vocab, options.dry_multiplier, options.dry_base, options.dry_allowed_length, kContextSize,
                                   breakers.data(), breakers.size()));
    }
    add(llama_sampler_init_top_k(options.top_k));
    add(llama_sampler_init_top_p(options.top_p, 1));
    add(llama_sampler_init_min_p(options.min_p, 1));
    add(llama_sampler_init_temp(options.temperature));
    add(llama_sampler_init_dist(*options.seed));
    for (const auto token : prompt) {
        llama_sampler_accept(chain.get(), token);
    }
    std::vector<llama_token_data> candidates;
    for (std::int32_t i = 0; i < size; i++) {
        candidates.push_back({i, logits[static_cast<std::size_t>(i)], 0.0f});
    }
    llama_token_data_array array{candidates.data(), candidates.size(), -1, false};
    llama_sampler_apply(chain.get(), &array);
    return array.data[array.selected].id;
}

SamplingOptions with_grammar(const char* grammar, float temperature = 1.0f) {
    SamplingOptions options;
    options.temperature = temperature;
    options.grammar = grammar;
    options.seed = 7;
    return options;
}

// Samples until the end of the text; random logits.
std::string generate(const SamplingOptions& options, unsigned seed, int limit = 200) {
    const NativeScope scope;
    auto sampler = make_sampler(options);
    std::string text;
    for (int i = 0; i < limit; i++) {
        const auto token = sampler.sample(random_logits(seed * 1000 + static_cast<unsigned>(i)).data());
        if (token == test::kEos) {
            return text;
        }
        text += token == test::kSpace ? ' ' : static_cast<char>(token - test::kFirstByte);
    }
    return text + "<cut off>";
}

}  // namespace

TEST_CASE("top_candidates is std::partial_sort of all candidates, equals included") {
    std::mt19937 random(11);
    for (const int count : {1, 5, 64, 100, 1000, 5000}) {
        for (const unsigned different : {1u, 3u, 50u, 100'000u}) {
            for (const int order : {0, 1, -1}) {
                std::vector<float> values(static_cast<std::size_t>(count));
                for (auto& value : values) {
                    value = static_cast<float>(random() % different) - 10.0f;
                }
                if (order != 0) {
                    std::sort(values.begin(), values.end(), [order](float a, float b) { return order > 0 ? a < b : a > b; });
                }
                const int k = std::min(count, 40);
                std::vector<llama_token_data> expected;
                for (std::int32_t i = 0; i < count; i++) {
                    expected.push_back({i, values[static_cast<std::size_t>(i)], 0.0f});
                }
                std::partial_sort(expected.begin(), expected.begin() + k, expected.end(), [](const auto& a, const auto& b) { return a.logit > b.logit; });
                std::vector<llama_token_data> selected;
                top_candidates(values.data(), count, 40, selected);
                REQUIRE(selected.size() == static_cast<std::size_t>(k));
                for (std::size_t i = 0; i < selected.size(); i++) {
                    CHECK_EQ(selected[i].id, expected[i].id);
                }
            }
        }
    }
}

TEST_CASE("what is selected ahead of llama.cpp's samplers changes no choice") {
    std::mt19937 random(3);
    for (unsigned seed = 0; seed < 300; seed++) {
        SamplingOptions options;
        options.seed = seed;
        options.top_k = static_cast<int>(1 + random() % 60);
        options.repeat_penalty = seed % 3 == 0 ? 1.0f : 1.3f;
        options.presence_penalty = seed % 5 == 0 ? 0.4f : 0.0f;
        options.dry_multiplier = seed % 4 == 0 ? 0.8f : 0.0f;
        options.dry_sequence_breakers = {"\n"};
        if (seed % 2 == 0) {
            options.logit_bias = {{30, 2.0f}, {40, -kInfinity}};
        }
        auto logits = random_logits(seed);
        if (seed % 7 < 3) {
            std::transform(logits.begin(), logits.end(), logits.begin(), [](float logit) { return std::floor(logit); });  // many equals
        }
        std::vector<std::int32_t> prompt;
        for (int i = 0; i < 100; i++) {
            prompt.push_back(static_cast<std::int32_t>(3 + random() % 6));
        }
        auto sampler = make_sampler(options);
        sampler.accept_prompt(prompt);
        CHECK_EQ(sampler.sample(logits.data()), choose_by_full_chain(options, logits, prompt));
    }
}

TEST_CASE("min_keep leaves that many candidates") {
    const auto logits = logits_of({{10, 9.0f}, {20, 5.0f}, {30, 4.5f}});
    auto options = plain(5.0f);
    options.min_p = 0.9f;
    CHECK(sampled(options, logits) == (std::set<int>{10}));
    options.min_keep = 2;
    CHECK(sampled(options, logits) == (std::set<int>{10, 20}));
}

TEST_CASE("the dynamic temperature is high where the choice is open and low where it is not") {
    auto options = plain(1.0f);
    options.dynatemp_range = 1.0f;
    // One clear favourite: the temperature is near 0.
    const auto clear = logits_of({{10, 8.0f}, {20, 4.0f}});
    CHECK(sampled(options, clear, 1000) == (std::set<int>{10}));
    options.dynatemp_range = 0.0f;
    CHECK(sampled(options, clear, 1000) == (std::set<int>{10, 20}));
}

TEST_CASE("adaptive_target prefers tokens near that probability") {
    const auto logits = logits_of({{10, std::log(0.7f)}, {20, std::log(0.2f)}, {30, std::log(0.1f)}});
    const auto share_of_first = [&](float target) {
        auto options = plain(1.0f);
        options.adaptive_target = target;
        auto sampler = make_sampler(options);
        int first = 0;
        for (int i = 0; i < 1000; i++) {
            first += sampler.sample(logits.data()) == 10 ? 1 : 0;
        }
        return first;
    };
    CHECK(share_of_first(0.1f) < share_of_first(0.9f));
    CHECK(share_of_first(0.9f) > 800);
}

TEST_CASE("infill ends the text where that is likely enough") {
    const auto logits = logits_of({{test::kEos, 3.0f}, {50, 4.0f}});
    auto options = plain(0.0f);
    CHECK_EQ(make_sampler(options).sample(logits.data()), 50);
    options.infill = true;
    CHECK_EQ(make_sampler(options).sample(logits.data()), test::kEos);
}

TEST_CASE("a text with a grammar is of the grammar, whatever the temperature") {
    for (unsigned seed = 0; seed < 40; seed++) {
        for (const float temperature : {0.0f, 0.7f, 5.0f}) {
            const auto text = generate(with_grammar("root ::= (\"yes\" | \"no\") [0-9]{2}", temperature), seed);
            const bool word = text.rfind("yes", 0) == 0 || text.rfind("no", 0) == 0;
            CHECK(word && text.size() == (text[0] == 'y' ? 5u : 4u));
            CHECK(std::isdigit(static_cast<unsigned char>(text[text.size() - 1])) && std::isdigit(static_cast<unsigned char>(text[text.size() - 2])));
        }
    }
}

TEST_CASE("with a grammar the most likely of the allowed tokens is chosen greedily") {
    const NativeScope scope;
    auto sampler = make_sampler(with_grammar("root ::= [a-f]", 0.0f));
    const auto logits = logits_of({{test::byte_token('x'), 9.0f}, {test::byte_token('c'), 2.0f}, {test::byte_token('d'), 3.0f}, {test::kEos, 8.0f}});
    CHECK_EQ(sampler.sample(logits.data()), test::byte_token('d'));
    CHECK_EQ(sampler.sample(logits.data()), test::kEos);
}

TEST_CASE("a grammar's choices are distributed as if the forbidden tokens were not there") {
    const NativeScope scope;
    const auto logits = logits_of({{test::byte_token('x'), 3.0f}, {test::byte_token('a'), std::log(3.0f)}, {test::byte_token('b'), 0.0f}});
    int a = 0;
    for (unsigned seed = 0; seed < 2000; seed++) {
        auto options = with_grammar("root ::= [ab]");
        options.seed = seed;
        a += make_sampler(options).sample(logits.data()) == test::byte_token('a') ? 1 : 0;
    }
    CHECK(a > 1380 && a < 1620);  // three quarters
}

TEST_CASE("the text may end only where the grammar may, and ends there in spite of ignore_eos") {
    const NativeScope scope;
    const auto logits = logits_of({{test::kEos, 9.0f}, {test::byte_token('a'), 1.0f}});
    for (const float temperature : {0.0f, 1.0f}) {
        auto options = with_grammar("root ::= \"aa\"", temperature);
        options.ignore_eos = true;
        auto sampler = make_sampler(options);
        CHECK_EQ(sampler.sample(logits.data()), test::byte_token('a'));
        CHECK_EQ(sampler.sample(logits.data()), test::byte_token('a'));
        CHECK_EQ(sampler.sample(logits.data()), test::kEos);
    }
}

TEST_CASE("a grammar that leaves no token is an error of that request") {
    const NativeScope scope;
    auto options = with_grammar("root ::= \"q\"");
    options.logit_bias[test::byte_token('q')] = -kInfinity;
    auto sampler = make_sampler(options);
    CHECK_THROWS(DecodeError, sampler.sample(random_logits(1).data()));
}

TEST_CASE("what a grammar allows is well-formed text, without control tokens") {
    const NativeScope scope;
    auto sampler = make_sampler(with_grammar("root ::= [^a]{2}", 0.0f));
    const auto byte = [](int value) { return test::kFirstByte + value; };
    // <s> would be three characters by its name; E0 82 A9 is U+00A9 in a byte too many.
    CHECK_EQ(sampler.sample(logits_of({{test::kBos, 9.0f}, {byte(0xE0), 8.0f}, {byte('b'), 1.0f}}).data()), byte(0xE0));
    CHECK_EQ(sampler.sample(logits_of({{byte(0x82), 9.0f}, {byte(0xA2), 1.0f}}).data()), byte(0xA2));
    CHECK_EQ(sampler.sample(logits_of({{byte('b'), 9.0f}, {byte(0xA9), 1.0f}}).data()), byte(0xA9));
    CHECK_EQ(sampler.sample(logits_of({{byte(0xC0), 9.0f}, {byte('b'), 1.0f}}).data()), byte('b'));
    CHECK_EQ(sampler.sample(random_logits(1).data()), test::kEos);
}

TEST_CASE("a bad grammar is refused with llama.cpp's reason") {
    const NativeScope scope;
    const auto reason = [](const std::string& grammar) { return CHECK_THROWS(InvalidOptionError, make_sampler(with_grammar(grammar.c_str()))); };
    const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
    CHECK(has(reason("root := x"), "expecting ::="));
    CHECK(has(reason("root ::= missing"), "missing"));
    CHECK(has(reason("start ::= \"x\""), "root"));
    CHECK(has(reason("root ::= root \"x\" | \"y\""), "left recursion"));
    CHECK(has(reason("root ::= \"x"), "unexpected end"));
    CHECK(has(reason(""), "empty"));
    CHECK(has(reason("root ::= " + std::string(5000, '(')), "5000"));
}

TEST_CASE("a JSON schema gives JSON of the schema") {
    SamplingOptions options;
    options.temperature = 1.5f;
    options.json_schema = R"({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false})";
    options.seed = 1;
    options.validate();
    for (unsigned seed = 0; seed < 20; seed++) {
        std::string text = generate(options, seed);
        text.erase(std::remove_if(text.begin(), text.end(), [](unsigned char c) { return std::isspace(c) != 0; }), text.end());
        CHECK(text == R"({"ok":true})" || text == R"({"ok":false})");
    }
}

TEST_CASE("a JSON schema that cannot be used is refused when the options are checked") {
    const auto reason = [](const std::string& schema) {
        SamplingOptions options;
        options.json_schema = schema;
        return CHECK_THROWS(InvalidOptionError, options.validate());
    };
    for (const std::string schema : {"{", "[]", R"({"type": "word"})", R"({"$ref": "#/$defs/none"})", R"({"type": "string", "pattern": "^(?=a)$"})", ""}) {
        CHECK(reason(schema).find("json_schema") == 0);
    }
    reason(std::string(100'000, '['));
    SamplingOptions anything;
    for (const char* schema : {"{}", "true", R"({"properties": {"a": true}})"}) {
        anything.json_schema = schema;
        anything.validate();
    }
}

TEST_CASE("a lazy grammar binds from its trigger on, and not inside of thinking") {
    const NativeScope scope;
    SamplingOptions options;
    options.temperature = 0;
    options.chat_grammar.text = "root ::= \"<\" [0-9] \">\"";
    options.chat_grammar.lazy = true;
    options.chat_grammar.trigger_patterns = {"<"};
    const auto wish = [](Sampler& sampler, const std::string& text) {
        std::string chosen;
        for (const char c : text) {
            const auto token = sampler.sample(logits_of({{test::byte_token(c), 9.0f}, {test::byte_token('5'), 1.0f}, {test::byte_token('>'), 0.5f}}).data());
            chosen += static_cast<char>(token - test::kFirstByte);
        }
        return chosen;
    };
    auto sampler = make_sampler(options);
    CHECK_EQ(wish(sampler, "abc<xy"), "abc<5>");

    options.chat_grammar.thinking_start = {test::byte_token('(')};
    options.chat_grammar.thinking_end = {{test::byte_token(')')}};
    auto thinking = make_sampler(options);
    CHECK_EQ(wish(thinking, "(a<x)b<xy"), "(a<x)b<5>");

    options.chat_grammar.prefill = {test::byte_token('(')};  // it thinks from the start
    auto prefilled = make_sampler(options);
    CHECK_EQ(wish(prefilled, "a<x)<xy"), "a<x)<5>");
}

TEST_CASE("a grammar that is not lazy goes on behind what the prompt has of it") {
    const NativeScope scope;
    SamplingOptions options;
    options.temperature = 0;
    options.chat_grammar.text = "root ::= \"ab\"";
    options.chat_grammar.prefill = {test::byte_token('a')};
    auto sampler = make_sampler(options);
    CHECK_EQ(sampler.sample(random_logits(1).data()), test::byte_token('b'));
    options.chat_grammar.prefill = {test::byte_token('x')};
    CHECK_THROWS(InvalidOptionError, make_sampler(options));
}
