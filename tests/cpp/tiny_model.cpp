#include "tiny_model.h"

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <random>

#include "temp_dir.h"

namespace test {
namespace {

constexpr int kWidth = 64;
constexpr int kHeads = 2;
constexpr int kHiddenWidth = 32;

// Normal numbers by the Box-Muller formula: std::normal_distribution differs between standard libraries.
class Weights {
   public:
    explicit Weights(unsigned seed) : random_(seed) {}

    std::vector<float> operator()(const std::vector<std::int64_t>& shape, double deviation) {
        std::size_t count = 1;
        for (const auto extent : shape) {
            count *= static_cast<std::size_t>(extent);
        }
        std::vector<float> values(count);
        for (auto& value : values) {
            const double radius = std::sqrt(-2.0 * std::log(uniform()));
            value = static_cast<float>(deviation * radius * std::cos(2.0 * M_PI * uniform()));
        }
        return values;
    }

   private:
    double uniform() { return (static_cast<double>(random_()) + 1.0) / (static_cast<double>(std::mt19937::max()) + 2.0); }

    std::mt19937 random_;
};

void add_vocabulary(GgufBuilder& gguf, int more_tokens) {
    std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
    std::vector<std::int32_t> types = {2, 3, 3};  // unknown, control, control
    for (int byte = 0; byte < 256; byte++) {
        char name[8];
        std::snprintf(name, sizeof(name), "<0x%02X>", static_cast<unsigned>(byte));
        tokens.emplace_back(name);
        types.push_back(6);  // byte
    }
    tokens.emplace_back("\xE2\x96\x81");
    types.push_back(1);  // normal
    for (int i = 0; i < more_tokens; i++) {
        tokens.push_back("more " + std::to_string(i));
        types.push_back(1);
    }
    gguf.set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.scores", std::vector<float>(tokens.size(), 0.0f))
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.unknown_token_id", 0u)
        .set("tokenizer.ggml.bos_token_id", static_cast<std::uint32_t>(kBos))
        .set("tokenizer.ggml.eos_token_id", static_cast<std::uint32_t>(kEos))
        .set("tokenizer.ggml.add_bos_token", true)
        .set("tokenizer.ggml.add_space_prefix", false);
}

TempDir& model_directory() {
    static TempDir directory;
    return directory;
}

}  // namespace

GgufBuilder tiny_model(const TinyModelOptions& options) {
    const auto number = [](int value) { return static_cast<std::uint32_t>(value); };
    const int vocab_size = kVocabSize + options.more_tokens;
    GgufBuilder gguf;
    gguf.set("general.architecture", "llama")
        .set("general.name", "tiny")
        .set("llama.block_count", number(options.layers))
        .set("llama.context_length", number(options.context_length))
        .set("llama.embedding_length", number(kWidth))
        .set("llama.feed_forward_length", number(kHiddenWidth))
        .set("llama.attention.head_count", number(kHeads))
        .set("llama.attention.head_count_kv", number(kHeads))
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f)
        .set("llama.rope.dimension_count", number(kWidth / kHeads))
        .set("llama.vocab_size", number(vocab_size));
    if (options.experts > 0) {
        gguf.set("llama.expert_count", number(options.experts)).set("llama.expert_used_count", number(options.experts_used));
    }
    add_vocabulary(gguf, options.more_tokens);

    Weights random(options.seed);
    const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape, double deviation) {
        gguf.tensor(name, shape, random(shape, deviation));
    };
    const auto ones = [&](const std::string& name) { gguf.tensor(name, {kWidth}, std::vector<float>(kWidth, 1.0f)); };
    const double unit = 1.0 / std::sqrt(kWidth);  // keeps activations of one size, so that logits differ clearly
    if (options.more_tokens > 0) {
        gguf.tensor("token_embd.weight", {kWidth, vocab_size}, GGML_TYPE_Q4_0);
    } else {
        add("token_embd.weight", {kWidth, vocab_size}, 1.0);
    }
    for (int layer = 0; layer < options.layers; layer++) {
        const std::string block = "blk." + std::to_string(layer) + ".";
        ones(block + "attn_norm.weight");
        for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output"}) {
            add(block + name + ".weight", {kWidth, kWidth}, 2 * unit);
        }
        ones(block + "ffn_norm.weight");
        if (options.experts == 0) {
            add(block + "ffn_gate.weight", {kWidth, kHiddenWidth}, 2 * unit);
            add(block + "ffn_up.weight", {kWidth, kHiddenWidth}, 2 * unit);
            add(block + "ffn_down.weight", {kHiddenWidth, kWidth}, 2 * unit);
            continue;
        }
        add(block + "ffn_gate_inp.weight", {kWidth, options.experts}, unit);
        add(block + "ffn_gate_exps.weight", {kWidth, kHiddenWidth, options.experts}, 2 * unit);
        add(block + "ffn_up_exps.weight", {kWidth, kHiddenWidth, options.experts}, 2 * unit);
        add(block + "ffn_down_exps.weight", {kHiddenWidth, kWidth, options.experts}, 2 * unit);
    }
    ones("output_norm.weight");
    if (!options.tied_output) {
        add("output.weight", {kWidth, vocab_size}, 2 * unit);
    }
    return gguf;
}

std::string tiny_model_file(const TinyModelOptions& options) {
    std::string name = "tiny";
    for (const int value : {options.layers, options.experts, options.experts_used, options.context_length, options.tied_output ? 1 : 0,
                            options.more_tokens}) {
        name += "-" + std::to_string(value);
    }
    const std::string path = model_directory().file(name + "-" + std::to_string(options.seed) + ".gguf");
    if (!std::filesystem::exists(path)) {
        tiny_model(options).write(path);
    }
    return path;
}

void remove_tiny_model_files() {
    std::filesystem::remove_all(model_directory().path());
}

std::shared_ptr<llama_moe::Model> load_tiny_model(const TinyModelOptions& options) {
    llama_moe::ModelOptions model_options;
    model_options.devices.emplace();
    llama_moe::PlacementPolicy policy;
    policy.kind = llama_moe::PlacementPolicy::Kind::gpu;
    return llama_moe::Model::load(tiny_model_file(options), model_options, policy);
}

}  // namespace test
