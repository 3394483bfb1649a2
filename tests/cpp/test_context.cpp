#include "llama_moe/context.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <future>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>

#include "llama_moe/error.h"
#include "llama_moe/live_objects.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;
using test::contains;

namespace {

constexpr std::size_t kColumns = static_cast<std::size_t>(test::kVocabSize);

constexpr float kTolerance = 1e-4f;

struct Interrupt : std::runtime_error {
    Interrupt() : std::runtime_error("interrupted") {}
};

const std::shared_ptr<Model>& model() {
    static const auto instance = test::load_tiny_model();
    return instance;
}

ContextOptions small_options(int sequences = 1) {
    ContextOptions options;
    options.context_size = 256;
    options.max_sequences = sequences;
    options.threads = 1;
    options.kv_type = "f32";  // exact, both: rounding would hide small differences
    options.flash_attention = "off";
    return options;
}

// A context for prompts so long that computing one takes much longer than the interval of polls.
ContextOptions long_options() {
    auto options = small_options();
    options.context_size = 16 * 1024;
    options.micro_batch_size = 16;
    return options;
}

std::vector<std::int32_t> tokens_of(std::size_t count, int seed = 0) {
    std::vector<std::int32_t> tokens(count);
    for (std::size_t i = 0; i < count; i++) {
        tokens[i] = test::kFirstByte + static_cast<std::int32_t>((i * 37 + static_cast<std::size_t>(seed) * 101) % 256);
    }
    return tokens;
}

DecodeInput input_of(std::vector<std::int32_t> tokens, Outputs outputs = Outputs::last) {
    DecodeInput input;
    input.tokens = std::move(tokens);
    input.outputs = outputs;
    return input;
}

DecodeInput for_sequence(std::vector<std::int32_t> tokens, int sequence) {
    auto input = input_of(std::move(tokens));
    input.sequence_ids.emplace(input.tokens.size(), sequence);
    return input;
}

float largest_difference(const float* a, const float* b, std::size_t count) {
    float largest = 0;
    for (std::size_t i = 0; i < count; i++) {
        // Comparing this way round, NaN is a difference.
        largest = std::abs(a[i] - b[i]) <= largest ? largest : std::abs(a[i] - b[i]);
    }
    return largest;
}

// Two ways to compute the same: batches of another size add up in another order.
void check_close(const std::vector<float>& actual, const std::vector<float>& expected) {
    REQUIRE(actual.size() == expected.size() && !expected.empty());
    const float difference = largest_difference(actual.data(), expected.data(), expected.size());
    if (!(difference < kTolerance)) {
        test::fail(__FILE__, __LINE__, "logits differ by " + std::to_string(difference));
    }
}

std::string invalid(Context& context, DecodeInput input) {
    return CHECK_THROWS(InvalidOptionError, context.decode(std::move(input)));
}

}  // namespace

TEST_CASE("ContextOptions refuses what it cannot mean, with the value") {
    ContextOptions().validate();
    const auto invalid_option = [](auto change) {
        ContextOptions options;
        change(options);
        return CHECK_THROWS(InvalidOptionError, options.validate());
    };
    CHECK_EQ(invalid_option([](auto& o) { o.context_size = -1; }),
             "context_size is -1; it must be 0 (the length the model was trained for) or more");
    CHECK_EQ(invalid_option([](auto& o) { o.max_sequences = 0; }), "max_sequences is 0; it must be 1 or more");
    CHECK(contains(invalid_option([](auto& o) { o.max_sequences = 1'000'000; }), "llama.cpp holds at most"));
    CHECK(contains(invalid_option([](auto& o) { o.batch_size = 0; }), "batch_size is 0"));
    CHECK(contains(invalid_option([](auto& o) { o.micro_batch_size = 0; }), "micro_batch_size is 0"));
    CHECK(contains(invalid_option([](auto& o) { o.threads = -1; }), "threads is -1"));
    CHECK(contains(invalid_option([](auto& o) { o.threads_batch = -2; }), "threads_batch is -2"));
    CHECK(contains(invalid_option([](auto& o) { o.kv_type = "f17"; }), "kv_type is 'f17'; it must be one of f32, f16, bf16, q8_0"));
    CHECK(contains(invalid_option([](auto& o) { o.flash_attention = "maybe"; }), "flash_attention is 'maybe'; it must be auto, on or off"));
}

TEST_CASE("a context's limits are what it was asked for, rounded up") {
    auto options = small_options(3);
    options.context_size = 100;
    options.batch_size = 64;
    options.micro_batch_size = 200;
    options.threads_batch = 2;
    const auto context = Context::create(model(), options);
    CHECK_EQ(context->limits().context_size, 256);  // llama.cpp pads to 256
    CHECK_EQ(context->limits().max_sequences, 3);
    CHECK_EQ(context->limits().batch_size, 64);
    CHECK_EQ(context->limits().micro_batch_size, 64);
    CHECK_EQ(context->limits().threads, 1);
    CHECK_EQ(context->limits().threads_batch, 2);
    options.context_size = 0;
    CHECK_EQ(Context::create(model(), options)->limits().context_size, model()->context_length());
}

TEST_CASE("outputs choose the rows of logits") {
    const auto context = Context::create(model(), small_options());
    const auto tokens = tokens_of(20);
    const auto all = context->decode(input_of(tokens, Outputs::all));
    CHECK_EQ(all->rows, 20u);
    CHECK_EQ(all->columns, kColumns);
    CHECK_EQ(all->values.size(), 20 * kColumns);

    context->clear();
    const auto last = context->decode(input_of(tokens));
    CHECK_EQ(last->rows, 1u);
    check_close(last->values, {all->values.end() - static_cast<std::ptrdiff_t>(kColumns), all->values.end()});

    context->clear();
    auto masked = input_of(tokens, Outputs::mask);
    masked.mask.assign(20, 0);
    masked.mask[3] = masked.mask[17] = 1;
    const auto some = context->decode(masked);
    CHECK_EQ(some->rows, 2u);
    CHECK(largest_difference(some->values.data(), all->values.data() + 3 * kColumns, kColumns) < kTolerance);
    CHECK(largest_difference(some->values.data() + kColumns, all->values.data() + 17 * kColumns, kColumns) < kTolerance);

    context->clear();
    masked.mask.assign(20, 0);
    CHECK_EQ(context->decode(masked)->rows, 0u);
    CHECK_EQ(context->sequence_length(0), 20);
}

TEST_CASE("the tokens before count: logits are of the sequence, not of the token alone") {
    const auto context = Context::create(model(), small_options());
    const auto first = context->decode(input_of({10, 50}));
    context->clear();
    const auto second = context->decode(input_of({11, 50}));
    CHECK(largest_difference(first->values.data(), second->values.data(), kColumns) > 0.1f);
}

TEST_CASE("decoding in pieces, in batches and at once gives the same logits") {
    const auto tokens = tokens_of(150);
    const auto at_once = Context::create(model(), small_options())->decode(input_of(tokens, Outputs::all));

    auto options = small_options();
    options.batch_size = 32;
    options.micro_batch_size = 8;
    const auto batched = Context::create(model(), options);
    check_close(batched->decode(input_of(tokens, Outputs::all))->values, at_once->values);

    const auto pieces = Context::create(model(), small_options());
    std::vector<float> joined;
    for (std::size_t begin = 0; begin < tokens.size();) {
        const std::size_t end = std::min(begin + 1 + begin % 23, tokens.size());
        const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(begin);
        const auto logits = pieces->decode(input_of({first, tokens.begin() + static_cast<std::ptrdiff_t>(end)}, Outputs::all));
        joined.insert(joined.end(), logits->values.begin(), logits->values.end());
        begin = end;
        CHECK_EQ(pieces->sequence_length(0), static_cast<int>(end));
    }
    check_close(joined, at_once->values);
}

TEST_CASE("sequences in one call do not see each other, in whatever order their tokens come") {
    const auto first = tokens_of(12, 1);
    const auto second = tokens_of(9, 2);
    const auto single = Context::create(model(), small_options());
    const auto expected_first = single->decode(input_of(first));
    single->clear();
    const auto expected_second = single->decode(input_of(second));

    const auto context = Context::create(model(), small_options(2));
    DecodeInput mixed;
    mixed.sequence_ids.emplace();
    for (std::size_t i = 0; i < 12; i++) {
        mixed.tokens.push_back(first[i]);
        mixed.sequence_ids->push_back(0);
        if (i < 9) {
            mixed.tokens.push_back(second[i]);
            mixed.sequence_ids->push_back(1);
        }
    }
    const auto logits = context->decode(mixed);
    REQUIRE(logits->rows == 2);  // rows are in the order of the tokens: sequence 1 ended before
    check_close({logits->values.begin(), logits->values.begin() + static_cast<std::ptrdiff_t>(kColumns)}, expected_second->values);
    check_close({logits->values.begin() + static_cast<std::ptrdiff_t>(kColumns), logits->values.end()}, expected_first->values);
    CHECK_EQ(context->sequence_length(0), 12);
    CHECK_EQ(context->sequence_length(1), 9);
}

TEST_CASE("input that does not fit together is refused and changes nothing") {
    const auto context = Context::create(model(), small_options(2));
    context->decode(input_of(tokens_of(5)));
    CHECK_EQ(invalid(*context, input_of({})), "tokens is empty; give at least one");
    CHECK_EQ(invalid(*context, input_of({5, -1})),
             "tokens[1] is -1; the vocabulary has the tokens 0 to " + std::to_string(test::kVocabSize - 1));
    CHECK(contains(invalid(*context, input_of({test::kVocabSize})), "tokens[0] is " + std::to_string(test::kVocabSize)));
    CHECK_EQ(invalid(*context, for_sequence({5}, 2)), "sequence_ids[0] is 2; the context has the sequences 0 to 1");
    CHECK(contains(invalid(*context, for_sequence({5}, -1)), "sequence_ids[0] is -1"));
    auto input = input_of({5, 6});
    input.positions = {{5}};
    CHECK_EQ(invalid(*context, input), "positions has 1 entries for 2 tokens");
    input.positions = {{5, 7}};
    CHECK(contains(invalid(*context, input), "positions[1] is 7; sequence 0 goes on at 6"));
    input.positions = {{4, 5}};
    CHECK(contains(invalid(*context, input), "positions[0] is 4; sequence 0 goes on at 5"));
    input.positions = {{-1, 0}};
    CHECK(contains(invalid(*context, input), "positions[0] is -1"));
    input.positions.reset();
    input.sequence_ids = {{0, 0, 0}};
    CHECK_EQ(invalid(*context, input), "sequence_ids has 3 entries for 2 tokens");
    input.sequence_ids.reset();
    input.outputs = Outputs::mask;
    input.mask = {1};
    CHECK_EQ(invalid(*context, input), "outputs has 1 entries for 2 tokens");
    CHECK_EQ(context->sequence_length(0), 5);
    input = input_of({5, 6});
    input.positions = {{5, 6}};
    context->decode(input);
    CHECK_EQ(context->sequence_length(0), 7);
}

TEST_CASE("a context that is full says so and keeps what it has") {
    const auto context = Context::create(model(), small_options());
    const auto tokens = tokens_of(256);
    const auto whole = context->decode(input_of(tokens));
    CHECK_EQ(CHECK_THROWS(ContextFullError, context->decode(input_of({5}))), "sequence 0 would have 257 tokens; the context holds 256");
    CHECK_EQ(context->sequence_length(0), 256);
    context->clear();
    CHECK_THROWS(ContextFullError, context->decode(input_of(tokens_of(257))));
    CHECK_EQ(context->sequence_length(0), 0);
    check_close(context->decode(input_of(tokens))->values, whole->values);
}

TEST_CASE("an interrupted decode leaves the sequences as they were, and the context usable") {
    const auto context = Context::create(model(), long_options());
    const auto beginning = tokens_of(10, 3);
    const auto expected = Context::create(model(), small_options())->decode(input_of(tokens_of(11, 3)));
    context->decode(input_of(beginning));
    CHECK_THROWS(Interrupt, context->decode(input_of(tokens_of(12'000)), [] { throw Interrupt(); }));
    CHECK_EQ(context->sequence_length(0), 10);
    check_close(context->decode(input_of({tokens_of(11, 3).back()}))->values, expected->values);
}

TEST_CASE("who leaves its wait stops its own call and not the one before it") {
    const auto context = Context::create(model(), long_options());
    context->decode(input_of(tokens_of(10)));
    std::promise<void> decoding;
    std::atomic<bool> stop{false};
    std::thread first([&] {
        bool told = false;
        const auto poll = [&] {
            if (!std::exchange(told, true)) {
                decoding.set_value();
            }
            if (stop) {
                throw Interrupt();
            }
        };
        CHECK_THROWS(Interrupt, context->decode(input_of(tokens_of(15'000)), poll));  // and not cancelled before
    });
    decoding.get_future().wait();
    CHECK_THROWS(Interrupt, context->clear([] { throw Interrupt(); }));
    stop = true;
    first.join();
    CHECK_EQ(context->sequence_length(0), 10);  // the call behind it never ran
}

TEST_CASE("close stops a decode that runs, and later use is a ClosedError") {
    const int contexts = live_objects().contexts;
    auto context = Context::create(model(), long_options());
    CHECK_EQ(live_objects().contexts, contexts + 1);
    std::promise<void> decoding;
    std::thread first([&] {
        bool told = false;
        CHECK_THROWS(CancelledError, context->decode(input_of(tokens_of(15'000)), [&] {
                         if (!std::exchange(told, true)) {
                             decoding.set_value();
                         }
                     }));
    });
    decoding.get_future().wait();
    context->close();
    first.join();
    context->close();
    CHECK(context->closed());
    CHECK_EQ(CHECK_THROWS(ClosedError, context->decode(input_of({5}))), "the context is closed");
    CHECK_THROWS(ClosedError, context->remove(0, 0, -1));
    CHECK_THROWS(ClosedError, context->keep(0));
    CHECK_THROWS(ClosedError, context->clear());
    CHECK_THROWS(ClosedError, context->sequence_length(0));
    CHECK_THROWS(ClosedError, context->save_state(0));
    CHECK_THROWS(ClosedError, context->memory());
    CHECK_THROWS(ClosedError, context->breakdown());
    context.reset();
    CHECK_EQ(live_objects().contexts, contexts);
}

TEST_CASE("remove cuts a sequence, and what follows is computed from what is left") {
    const auto context = Context::create(model(), small_options(2));
    const auto tokens = tokens_of(30);
    const auto expected = context->decode(input_of({tokens.begin(), tokens.begin() + 20}));
    context->decode(input_of({tokens.begin() + 20, tokens.end()}));
    context->decode(for_sequence({5, 6}, 1));
    context->remove(0, 19, -1);
    CHECK_EQ(context->sequence_length(0), 19);
    check_close(context->decode(input_of({tokens[19]}))->values, expected->values);
    context->remove(-1, 0, -1);
    CHECK_EQ(context->sequence_length(0), 0);
    CHECK_EQ(context->sequence_length(1), 0);
    CHECK_EQ(CHECK_THROWS(InvalidOptionError, context->remove(2, 0, -1)), "there is no sequence 2; the context has the sequences 0 to 1");
    CHECK_THROWS(InvalidOptionError, context->remove(-2, 0, -1));
}

TEST_CASE("copy makes a second sequence that goes on by itself") {
    const auto context = Context::create(model(), small_options(3));
    const auto tokens = tokens_of(15);
    context->decode(for_sequence(tokens, 0));
    context->decode(for_sequence({9, 9, 9}, 1));  // replaced by the copy
    context->copy(0, 1, 0, -1);
    CHECK_EQ(context->sequence_length(1), 15);
    const auto from_copy = context->decode(for_sequence({5}, 1));
    CHECK_EQ(context->sequence_length(0), 15);
    check_close(context->decode(for_sequence({5}, 0))->values, from_copy->values);
    context->copy(0, 0, 0, -1);
    CHECK_EQ(context->sequence_length(0), 16);
    context->copy(0, 2, 0, 16);  // all of it, said in numbers
    CHECK_EQ(context->sequence_length(2), 16);
    CHECK(contains(CHECK_THROWS(InvalidOptionError, context->copy(0, 1, 0, 5)), "only a whole sequence"));
    CHECK(contains(CHECK_THROWS(InvalidOptionError, context->copy(0, 1, 3, -1)), "only a whole sequence"));
    CHECK_THROWS(InvalidOptionError, context->copy(0, 3, 0, -1));
    CHECK_THROWS(InvalidOptionError, context->copy(-1, 1, 0, -1));
}

TEST_CASE("keep drops the other sequences") {
    const auto context = Context::create(model(), small_options(3));
    for (int sequence = 0; sequence < 3; sequence++) {
        context->decode(for_sequence(tokens_of(5, sequence), sequence));
    }
    context->keep(1);
    CHECK_EQ(context->sequence_length(0), 0);
    CHECK_EQ(context->sequence_length(1), 5);
    CHECK_EQ(context->sequence_length(2), 0);
    CHECK_THROWS(InvalidOptionError, context->keep(-1));
}

TEST_CASE("a saved sequence goes on elsewhere as if it had never stopped") {
    const auto source = Context::create(model(), small_options(2));
    source->decode(for_sequence(tokens_of(40), 0));
    const std::string state = source->save_state(0);
    const auto expected = source->decode(for_sequence({7}, 0));

    auto options = small_options(2);
    options.batch_size = 16;
    const auto other = Context::create(model(), options);
    other->decode(for_sequence(tokens_of(3), 1));  // replaced
    other->load_state(state, 1);
    CHECK_EQ(other->sequence_length(1), 40);
    CHECK_EQ(other->sequence_length(0), 0);
    check_close(other->decode(for_sequence({7}, 1))->values, expected->values);
}

TEST_CASE("a saved context brings all its sequences back") {
    const auto context = Context::create(model(), small_options(2));
    context->decode(for_sequence(tokens_of(20, 1), 0));
    context->decode(for_sequence(tokens_of(10, 2), 1));
    const std::string state = context->save_state(-1);
    const auto expected = context->decode(for_sequence({7}, 1));
    context->clear();
    context->load_state(state, -1);
    CHECK_EQ(context->sequence_length(0), 20);
    CHECK_EQ(context->sequence_length(1), 10);
    check_close(context->decode(for_sequence({7}, 1))->values, expected->values);

    const auto fresh = Context::create(model(), small_options(2));
    fresh->load_state(state, -1);
    CHECK_EQ(fresh->sequence_length(0), 20);
}

TEST_CASE("a state that does not belong is refused and changes nothing") {
    const auto context = Context::create(model(), small_options(2));
    context->decode(for_sequence(tokens_of(20), 0));
    const std::string sequence = context->save_state(0);
    const std::string whole = context->save_state(-1);
    const auto refused = [&](const std::string& state, int target) {
        const auto message = CHECK_THROWS(InvalidOptionError, context->load_state(state, target));
        CHECK_EQ(context->sequence_length(0), 20);
        return message;
    };
    CHECK(contains(refused("", 0), "0 bytes; that is less than its header"));
    CHECK(contains(refused(sequence.substr(0, 20), 0), "less than its header"));
    CHECK(contains(refused(std::string(sequence.size(), 'x'), 0), "not a saved state"));
    CHECK(contains(refused(sequence.substr(0, sequence.size() - 1), 0), "truncated or damaged"));
    CHECK(contains(refused(sequence + "x", 0), "truncated or damaged"));
    for (const std::size_t at : {std::size_t{60}, sequence.size() / 2, sequence.size() - 1}) {
        auto damaged = sequence;
        damaged[at] = static_cast<char>(damaged[at] ^ 1);
        CHECK(contains(refused(damaged, 0), "truncated or damaged"));
    }
    auto newer = sequence;
    newer[8] = 2;  // the version
    CHECK(contains(refused(newer, 0), "of this version"));
    CHECK(contains(refused(whole, 0), "of a whole context"));
    CHECK(contains(refused(sequence, -1), "of one sequence"));
    CHECK_THROWS(InvalidOptionError, context->load_state(sequence, 2));
    CHECK_THROWS(InvalidOptionError, context->save_state(2));

    test::TinyModelOptions wider;
    wider.layers = 3;
    const auto other_model = test::load_tiny_model(wider);
    const auto other = Context::create(other_model, small_options(2));
    CHECK_EQ(CHECK_THROWS(InvalidOptionError, other->load_state(sequence, 0)), "the saved state is of another model, or of other LoRA adapters");
}

TEST_CASE("a state is refused by a context of another size or type, which stays usable") {
    auto options = small_options(2);
    options.context_size = 512;
    const auto source = Context::create(model(), options);
    source->decode(for_sequence(tokens_of(300), 0));
    source->decode(for_sequence(tokens_of(300), 1));
    auto quantised = options;
    quantised.kv_type = "q8_0";
    quantised.flash_attention = "on";
    for (const auto& smaller : {small_options(2), small_options(1), quantised}) {
        for (const int sequence : {0, -1}) {
            const auto state = source->save_state(sequence);
            const auto context = Context::create(model(), smaller);
            CHECK_THROWS(InvalidOptionError, context->load_state(state, sequence));
            context->clear();
            context->decode(input_of(tokens_of(10)));
            CHECK_EQ(context->sequence_length(0), 10);
        }
    }
}

TEST_CASE("every type of KV cache works and takes the memory of its type") {
    const auto tokens = tokens_of(40);
    const auto exact = Context::create(model(), small_options())->decode(input_of(tokens));
    const std::vector<std::pair<const char*, double>> bits = {{"f32", 32}, {"f16", 16}, {"bf16", 16}, {"q8_0", 8.5}, {"q4_0", 4.5},
                                                              {"q4_1", 5}, {"q5_0", 5.5}, {"q5_1", 6}, {"iq4_nl", 4.5}};
    for (const auto& [type, size] : bits) {
        auto options = small_options();
        options.kv_type = type;
        options.flash_attention = "on";  // quantised values need it
        const auto context = Context::create(model(), options);
        const auto logits = context->decode(input_of(tokens));
        CHECK(largest_difference(logits->values.data(), exact->values.data(), kColumns) < (size < 10 ? 20.0f : 0.5f));
        std::uint64_t cache = 0;
        for (const auto& row : context->breakdown()) {
            cache += row.kind == "context" ? row.bytes : 0;
        }
        // Keys and values of 2 layers and 256 tokens of width 64; besides it llama.cpp keeps the logits of a call.
        const auto expected = static_cast<std::uint64_t>(2 * 2 * 256 * 64 * size / 8);
        CHECK(cache >= expected && cache < expected + expected / 8);
    }
}

TEST_CASE("memory has the weights, the KV cache and the compute buffers, and agrees with llama.cpp") {
    const auto context = Context::create(model(), small_options(2));
    std::uint64_t cache = 0;
    std::uint64_t compute = 0;
    for (const auto& row : context->breakdown()) {
        CHECK_EQ(row.device, "CPU");
        CHECK(row.host);
        cache += row.kind == "context" ? row.bytes : 0;
        compute += row.kind == "compute" ? row.bytes : 0;
    }
    std::map<std::string, std::uint64_t> roles;
    for (const auto& row : context->memory()) {
        roles[row.role] += row.bytes;
    }
    CHECK(roles.at("kv_cache") >= 2u * 2 * 256 * 2 * 64 * 4);  // sequences, layers, tokens, K and V, width, four bytes
    CHECK_EQ(roles.at("kv_cache"), cache);
    CHECK_EQ(roles.at("compute"), compute);
    std::uint64_t weights = 0;
    for (const auto& row : model()->memory()) {
        weights += row.bytes;
    }
    CHECK_EQ(roles.at("experts") + roles.at("weights"), weights);
}

TEST_CASE("a context that cannot be made is an error, and the model stays usable") {
    auto options = small_options(64);
    options.context_size = 1 << 30;
    CHECK(contains(CHECK_THROWS(InvalidOptionError, Context::create(model(), options)), "more than llama.cpp can index"));
    options = small_options();
    options.context_size = 1'500'000'000;
    CHECK_THROWS(DoesNotFitError, Context::create(model(), options));
    Context::create(model(), small_options())->decode(input_of({5}));
}

TEST_CASE("closing a model closes its contexts") {
    const int contexts = live_objects().contexts;
    auto own_model = test::load_tiny_model();
    auto first = Context::create(own_model, small_options());
    auto second = Context::create(own_model, small_options());
    const std::weak_ptr<LoadedModel> loaded = own_model->acquire();
    own_model->close();
    CHECK(loaded.expired());
    CHECK(first->closed() && second->closed());
    CHECK_THROWS(ClosedError, first->decode(input_of({5})));
    first.reset();
    second.reset();
    CHECK_EQ(live_objects().contexts, contexts);
}

TEST_CASE("a context keeps the weights it needs when the model object goes first") {
    auto own_model = test::load_tiny_model();
    const auto context = Context::create(own_model, small_options());
    const auto before = context->decode(input_of({5, 6}));
    context->clear();
    own_model.reset();  // closes
    CHECK(context->closed());
}

TEST_CASE("many threads may call one context") {
    const auto context = Context::create(model(), small_options(4));
    std::vector<std::thread> threads;
    for (int sequence = 0; sequence < 4; sequence++) {
        threads.emplace_back([&, sequence] {
            for (int i = 0; i < 20; i++) {
                context->decode(for_sequence(tokens_of(3, sequence), sequence));
                CHECK_EQ(context->sequence_length(sequence), 3 * (i + 1));
            }
        });
    }
    for (auto& thread : threads) {
        thread.join();
    }
}
