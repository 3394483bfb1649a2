#include "llama_moe/model.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <random>
#include <stdexcept>
#include <string>

#include "child_process.h"
#include "eventually.h"
#include "llama_moe/context.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/log.h"
#include "temp_dir.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;
using test::contains;

namespace {

ModelOptions on_cpu() {
    ModelOptions options;
    options.devices.emplace();
    return options;
}

PlacementPolicy policy_of(PlacementPolicy::Kind kind, int count = 0) {
    PlacementPolicy policy;
    policy.kind = kind;
    policy.count = count;
    return policy;
}

const PlacementPolicy kGpu = policy_of(PlacementPolicy::Kind::gpu);

std::string load_error(const std::string& path) {
    return CHECK_THROWS(ModelLoadError, Model::load(path, on_cpu(), kGpu));
}

struct Interrupt : std::runtime_error {
    Interrupt() : std::runtime_error("interrupted") {}
};

// A file that takes long to load: a large vocabulary, and hardly any weights.
std::string slow_model_file() {
    test::TinyModelOptions options;
    options.more_tokens = 250'000;
    options.tied_output = true;
    return test::tiny_model_file(options);
}

std::string all_bytes() {
    std::string bytes;
    for (int byte = 1; byte < 256; byte++) {
        bytes += static_cast<char>(byte);
    }
    return bytes;
}

}  // namespace

TEST_CASE("a model says what it is") {
    const auto model = test::load_tiny_model();
    CHECK_EQ(model->path(), test::tiny_model_file());
    CHECK_EQ(model->gguf().architecture, "llama");
    CHECK_EQ(model->gguf().expert_count, 4);
    CHECK_EQ(model->vocab_size(), test::kVocabSize);
    CHECK_EQ(model->context_length(), 1024);
    CHECK_EQ(model->embedding_length(), 64);
    CHECK_EQ(model->bos_token(), test::kBos);
    CHECK_EQ(model->eos_token(), test::kEos);
    CHECK(model->is_end_of_generation(test::kEos));
    CHECK(!model->is_end_of_generation(test::kBos));
    CHECK(!model->is_end_of_generation(-1));
    CHECK(!model->is_end_of_generation(test::kVocabSize));
    CHECK(!model->chat_template());
    CHECK(contains(model->description(), "llama"));
    CHECK_EQ(model->placement().size(), model->gguf().tensors.size());
}

TEST_CASE("a model's chat template is given as it is") {
    const test::TempDir directory;
    auto gguf = test::tiny_model();
    gguf.set("tokenizer.chat_template", "{{ messages }}");
    gguf.write(directory.file("m.gguf"));
    CHECK_EQ(Model::load(directory.file("m.gguf"), on_cpu(), kGpu)->chat_template(), std::optional<std::string>("{{ messages }}"));
}

TEST_CASE("a model's memory is its tensors, by role") {
    for (const char* host_memory : {"mmap", "pageable"}) {
        auto options = on_cpu();
        options.host_memory = host_memory;
        const auto model = Model::load(test::tiny_model_file(), options, kGpu);
        std::map<std::string, std::uint64_t> tensors;
        for (const auto& tensor : model->gguf().tensors) {
            tensors[tensor.role == TensorRole::experts ? "experts" : "weights"] += tensor.bytes;
        }
        std::map<std::string, std::uint64_t> rows;
        for (const auto& row : model->memory()) {
            CHECK_EQ(row.device, "CPU");
            rows[row.role] += row.bytes;
        }
        CHECK(rows == tensors);  // every tensor is a multiple of the alignment here
        CHECK_EQ(rows.at("experts"), 2u * 3 * 4 * 64 * 32 * 4);
    }
}

TEST_CASE("tokens and text turn into each other, byte by byte") {
    const auto model = test::load_tiny_model();
    const std::string text = "h\xC3\xA9, \xF0\x9F\x98\x80\n" + all_bytes();
    const auto tokens = model->tokenize(text, false, false);
    CHECK_EQ(tokens.size(), text.size());
    CHECK_EQ(model->detokenize(tokens, false), text);
    std::string joined;
    for (const auto token : tokens) {
        joined += model->token_bytes(token, false);
    }
    CHECK_EQ(joined, text);
    CHECK(model->tokenize("", false, false).empty());
    CHECK_EQ(model->detokenize({}, false), "");
}

TEST_CASE("special tokens are added and parsed only when asked for") {
    const auto model = test::load_tiny_model();
    CHECK_EQ(model->tokenize("a", true, false), (std::vector<std::int32_t>{test::kBos, test::byte_token('a')}));
    CHECK_EQ(model->tokenize("</s>", false, false).size(), 4u);
    CHECK_EQ(model->tokenize("</s>", false, true), std::vector<std::int32_t>{test::kEos});
    CHECK_EQ(model->token_bytes(test::kEos, true), "</s>");
    CHECK_EQ(model->token_bytes(test::kEos, false), "");
    CHECK_EQ(model->detokenize({test::byte_token('a'), test::kEos}, true), "a</s>");
}

TEST_CASE("a long text is tokenized whole") {
    const auto model = test::load_tiny_model();
    std::mt19937 random(1);
    std::string text;
    for (int i = 0; i < 30'000; i++) {
        text += static_cast<char>('a' + random() % 26);
    }
    const auto tokens = model->tokenize(text, true, true);
    CHECK_EQ(tokens.size(), text.size() + 1);
    CHECK(model->detokenize({tokens.begin() + 1, tokens.end()}, false) == text);
}

TEST_CASE("a token outside the vocabulary is named") {
    const auto model = test::load_tiny_model();
    for (const int token : {-1, test::kVocabSize, INT32_MAX}) {
        const std::string expected = "token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(test::kVocabSize);
        CHECK_EQ(CHECK_THROWS(InvalidOptionError, model->token_bytes(token, true)), expected);
        CHECK_EQ(CHECK_THROWS(InvalidOptionError, model->detokenize({5, token}, true)), expected);
    }
}

TEST_CASE("progress goes from 0 to 1 and never back, on the calling thread") {
    std::vector<float> values;
    const auto thread = std::this_thread::get_id();
    Model::load(test::tiny_model_file(), on_cpu(), kGpu, [&](float progress) {
        CHECK(std::this_thread::get_id() == thread);
        values.push_back(progress);
    });
    REQUIRE(values.size() >= 2);
    CHECK_EQ(values.front(), 0.0f);
    CHECK_EQ(values.back(), 1.0f);
    CHECK(std::is_sorted(values.begin(), values.end()));
}

TEST_CASE("an exception from the progress callback or a poll stops the load") {
    const int models = live_objects().models;
    CHECK_THROWS(Interrupt, Model::load(test::tiny_model_file(), on_cpu(), kGpu, [](float) { throw Interrupt(); }));
    take_log();
    set_log_level(static_cast<int>(LogLevel::info));
    CHECK_THROWS(Interrupt, Model::load(slow_model_file(), on_cpu(), kGpu, {}, [] { throw Interrupt(); }));
    CHECK(test::eventually([&] { return live_objects().models == models; }));
    set_log_level(static_cast<int>(LogLevel::warning));
    // The weights were not loaded in the background to be thrown away.
    const auto lines = take_log();
    CHECK(std::any_of(lines.begin(), lines.end(), [](const auto& line) { return contains(line.text, "cancelled model load"); }));
}

TEST_CASE("a file that is not a whole model is a ModelLoadError that says why") {
    const test::TempDir directory;
    const std::string path = directory.file("m.gguf");
    CHECK_THROWS(FileNotFoundError, Model::load(path, on_cpu(), kGpu));

    test::tiny_model().write(path);
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 64);
    CHECK(contains(load_error(path), "is truncated: tensor '"));

    auto unknown = test::tiny_model();
    unknown.set("general.architecture", "moonshine").write(path);
    CHECK(contains(load_error(path), "moonshine"));

    test::GgufBuilder incomplete;
    incomplete.set("general.architecture", "llama").set("llama.block_count", 2u).write(path);
    CHECK(contains(load_error(path), "cannot load '" + path + "': "));

    auto wrong_type = test::tiny_model();
    wrong_type.set("llama.embedding_length", "wide").write(path);
    CHECK(contains(load_error(path), "llama.embedding_length"));

    // llama.cpp asserts on these, which would end the process.
    auto experts = test::tiny_model();
    experts.set("llama.expert_used_count", 9u).write(path);
    load_error(path);
    auto heads = test::tiny_model();
    heads.set("llama.attention.head_count", 0u).write(path);
    load_error(path);
    auto layers = test::tiny_model();
    layers.set("llama.block_count", 0u).write(path);
    load_error(path);
}

TEST_CASE("a model whose header is damaged loads or is refused, and never ends the process") {
    const test::TempDir directory;
    const std::string path = directory.file("m.gguf");
    const auto gguf = test::tiny_model();
    gguf.write(path);
    const std::string original = test::read_file(path);
    // The architecture's numbers and the tensors' shapes; the vocabulary between them is long and dull.
    const std::size_t vocabulary = original.find("tokenizer.ggml.tokens");
    const std::size_t tensors = original.find("token_embd.weight");
    REQUIRE(vocabulary != std::string::npos && tensors != std::string::npos);
    std::mt19937 random(7);
    int refused = 0;
    constexpr int kRounds = 300;
    for (int round = 0; round < kRounds; round++) {
        auto bytes = original;
        const std::size_t size = gguf.header().size();
        const std::size_t at = round % 2 == 0 ? 24 + random() % (vocabulary - 24) : tensors + random() % (size - tensors);
        bytes[at] = static_cast<char>(random() % 3 == 0 ? 0xFF : random() % 256);
        test::write_file(path, bytes);
        try {
            Model::load(path, on_cpu(), kGpu);
        } catch (const Error&) {
            refused++;
        }
    }
    CHECK(refused > kRounds / 4 && refused < kRounds);
}

TEST_CASE("check_tensors finds a weight that is not a number") {
    const test::TempDir directory;
    const std::string path = directory.file("m.gguf");
    test::tiny_model().write(path);
    auto bytes = test::read_file(path);
    std::fill(bytes.end() - 64, bytes.end() - 32, '\xFF');  // in the last tensor
    test::write_file(path, bytes);
    Model::load(path, on_cpu(), kGpu);
    auto options = on_cpu();
    options.check_tensors = true;
    CHECK(contains(CHECK_THROWS(ModelLoadError, Model::load(path, options, kGpu)), "output.weight"));
    Model::load(test::tiny_model_file(), options, kGpu);
}

TEST_CASE("options and placements that cannot be are refused before the load") {
    auto options = on_cpu();
    options.host_memory = "pinned";
    CHECK(contains(CHECK_THROWS(InvalidOptionError, Model::load(test::tiny_model_file(), options, kGpu)), "pinned"));
    CHECK_THROWS(PlacementError, Model::load(test::tiny_model_file(), on_cpu(), policy_of(PlacementPolicy::Kind::cpu_first, 3)));
    test::TinyModelOptions dense;
    dense.experts = 0;
    CHECK_THROWS(PlacementError, Model::load(test::tiny_model_file(dense), on_cpu(), policy_of(PlacementPolicy::Kind::cpu)));
    Model::load(test::tiny_model_file(dense), on_cpu(), policy_of(PlacementPolicy::Kind::fit));
    auto policy = policy_of(PlacementPolicy::Kind::fit);
    policy.ram = 1000;
    CHECK_THROWS(DoesNotFitError, Model::load(test::tiny_model_file(), on_cpu(), policy));
}

TEST_CASE("a closed model refuses use, closes its users and can be closed again") {
    struct User : ModelUser {
        int closed = 0;
        void close() override { closed++; }
    };
    const auto model = test::load_tiny_model();
    const auto user = std::make_shared<User>();
    model->add_user(user);
    { model->add_user(std::make_shared<User>()); }  // gone before
    CHECK(!model->closed());
    model->close();
    model->close();
    CHECK(model->closed());
    CHECK_EQ(user->closed, 1);
    CHECK_EQ(CHECK_THROWS(ClosedError, model->tokenize("a", true, true)), "the model '" + test::tiny_model_file() + "' is closed");
    CHECK_THROWS(ClosedError, model->detokenize({5}, true));
    CHECK_THROWS(ClosedError, model->token_bytes(5, true));
    CHECK_THROWS(ClosedError, model->is_end_of_generation(5));
    CHECK_THROWS(ClosedError, model->memory());
    CHECK_THROWS(ClosedError, Context::create(model, {}));
    // One that was being made while the model closed would never be closed.
    CHECK_THROWS(ClosedError, model->add_user(user));
    CHECK_EQ(model->vocab_size(), test::kVocabSize);  // what was copied stays
}

TEST_CASE("loading and closing leaves nothing behind") {
    const int models = live_objects().models;
    for (int i = 0; i < 20; i++) {
        auto model = test::load_tiny_model();
        CHECK_EQ(live_objects().models, models + 1);
        const std::weak_ptr<LoadedModel> loaded = model->acquire();
        model->close();
        CHECK(loaded.expired());
        model.reset();
        CHECK_EQ(live_objects().models, models);
    }
}

ISOLATED_TEST_CASE("a model on an accelerator is where its placement says, by llama.cpp's own account") {
    test::Worker worker;
    add_rpc_device(worker.endpoint());
    test::TinyModelOptions tied;
    tied.tied_output = true;
    for (const auto& path : {test::tiny_model_file(), test::tiny_model_file(tied)}) {
        for (const auto& policy : {kGpu, policy_of(PlacementPolicy::Kind::cpu), policy_of(PlacementPolicy::Kind::cpu_first, 1)}) {
            const auto model = Model::load(path, {}, policy);
            std::uint64_t counted = 0;
            for (const auto& row : model->memory()) {
                counted += row.device == "RPC0" ? row.bytes : 0;
            }
            std::uint64_t placed = 0;
            for (const auto& tensor : model->placement()) {
                placed += tensor.device == "RPC0" ? tensor.bytes : 0;
            }
            std::uint64_t allocated = 0;
            ContextOptions options;
            options.context_size = 256;
            for (const auto& row : Context::create(model, options)->breakdown()) {
                allocated += row.device == "RPC0" && row.kind == "model" ? row.bytes : 0;
            }
            CHECK(placed > 0);
            CHECK_EQ(counted, placed);
            CHECK_EQ(allocated, counted);
        }
    }
}
