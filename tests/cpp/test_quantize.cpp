#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <random>
#include <set>

#include "gguf_builder.h"
#include "llama.h"
#include "llama_moe/error.h"
#include "llama_moe/quantize.h"
#include "temp_dir.h"
#include "test_support.h"

using namespace llama_moe;
using namespace test;

namespace {

constexpr int kWidth = 256;

std::vector<float> random_values(std::int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(count));
    std::generate(values.begin(), values.end(), [&] { return normal(engine); });
    return values;
}

// The weights and sizes of a MoE model, without what the quantiser does not look at. The experts' rows of `hidden` elements may be no
// multiple of a block.
GgufBuilder weights(int layers, int hidden, int experts = 2) {
    GgufBuilder gguf;
    gguf.set("general.architecture", "qwen3moe").set("general.name", "to quantize");
    gguf.set("qwen3moe.block_count", static_cast<std::uint32_t>(layers)).set("qwen3moe.context_length", 512u);
    gguf.set("qwen3moe.embedding_length", static_cast<std::uint32_t>(kWidth)).set("qwen3moe.feed_forward_length", 512u);
    gguf.set("qwen3moe.expert_feed_forward_length", static_cast<std::uint32_t>(hidden));
    gguf.set("qwen3moe.attention.head_count", 4u).set("qwen3moe.attention.head_count_kv", 2u);
    gguf.set("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f);
    gguf.set("qwen3moe.expert_count", static_cast<std::uint32_t>(experts)).set("qwen3moe.expert_used_count", 1u);
    unsigned seed = 0;
    const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
        std::int64_t count = 1;
        for (const auto extent : shape) {
            count *= extent;
        }
        gguf.tensor(name, shape, random_values(count, seed++));
    };
    add("token_embd.weight", {kWidth, 64});
    add("output.weight", {kWidth, 64});
    add("output_norm.weight", {kWidth});
    for (int i = 0; i < layers; i++) {
        const std::string block = "blk." + std::to_string(i) + ".";
        add(block + "attn_norm.weight", {kWidth});
        add(block + "attn_q.weight", {kWidth, kWidth});
        add(block + "attn_k.weight", {kWidth, kWidth / 2});
        add(block + "attn_v.weight", {kWidth, kWidth / 2});
        add(block + "attn_output.weight", {kWidth, kWidth});
        add(block + "ffn_gate_inp.weight", {kWidth, experts});
        add(block + "ffn_gate_exps.weight", {kWidth, hidden, experts});
        add(block + "ffn_up_exps.weight", {kWidth, hidden, experts});
        add(block + "ffn_down_exps.weight", {hidden, kWidth, experts});
    }
    return gguf;
}

// What llama.cpp itself writes.
std::string reference(const std::string& source, const std::string& target, int file_type, const Imatrix* imatrix) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = static_cast<llama_ftype>(file_type);
    params.nthread = 1;
    std::vector<std::vector<float>> values;
    std::vector<llama_model_imatrix_data> data;
    if (imatrix != nullptr) {
        for (const auto& [name, entry] : imatrix->entries) {
            values.push_back(imatrix->weights(name));
        }
        std::size_t i = 0;
        for (const auto& [name, entry] : imatrix->entries) {
            data.push_back({name.c_str(), values[i].data(), values[i].size()});
            i++;
        }
        data.push_back({nullptr, nullptr, 0});
        params.imatrix = data.data();
    }
    REQUIRE(llama_model_quantize(source.c_str(), target.c_str(), &params) == 0);
    return read_file(target);
}

std::shared_ptr<const Imatrix> importance(const std::string& source) {
    auto imatrix = std::make_shared<Imatrix>();
    imatrix->path = "imatrix.gguf";
    unsigned seed = 100;
    for (const auto& tensor : read_gguf(source).tensors) {
        if (tensor.name.rfind("blk.", 0) != 0 || tensor.shape.size() < 2) {
            continue;
        }
        const std::int64_t matrices = tensor.shape.size() > 2 ? tensor.shape[2] : 1;
        auto& entry = imatrix->entries[tensor.name];
        entry.sums = random_values(tensor.shape[0] * matrices, seed++);
        std::transform(entry.sums.begin(), entry.sums.end(), entry.sums.begin(), [](float value) { return value * value * 7.0f; });
        entry.counts.assign(static_cast<std::size_t>(matrices), 7.0f);
    }
    return imatrix;
}

bool plan_needs_imatrix(const QuantizePlan& plan) {
    return std::any_of(plan.tensors.begin(), plan.tensors.end(), [](const auto& tensor) { return tensor.needs_imatrix; });
}

}  // namespace

TEST_CASE("quantize writes the file that llama.cpp writes, byte for byte, for every mix that needs no importance matrix") {
    const TempDir folder;
    const std::string source = folder.file("source.gguf");
    weights(/*layers=*/8, /*hidden=*/32).write(source);
    std::set<std::string> seen;
    for (const auto& mix : mix_names()) {
        QuantizeOptions options;
        options.type = mix;
        options.threads = 3;
        if (mix == "Q1_0") {  // the one type without another to fall back to for narrow rows
            CHECK(CHECK_THROWS(ModelLoadError, plan_quantization(source, options)).find("no tensor type fallback") != std::string::npos);
            continue;
        }
        if (plan_needs_imatrix(plan_quantization(source, options))) {
            continue;
        }
        const std::string target = folder.file(mix + ".gguf");
        const auto plan = quantize(source, target, options);
        const std::string written = read_file(target);
        CHECK_EQ(written.size(), plan.file_bytes);
        CHECK(written == reference(source, folder.file("reference.gguf"), plan.file_type, nullptr));
        seen.insert(mix);
    }
    for (const char* mix : {"F16", "BF16", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_NL", "MXFP4_MOE", "TQ1_0"}) {
        CHECK(seen.count(mix) == 1);
    }
}

TEST_CASE("quantize writes llama.cpp's weights with an importance matrix too") {
    const TempDir folder;
    const std::string source = folder.file("source.gguf");
    weights(/*layers=*/1, /*hidden=*/32).write(source);
    QuantizeOptions options;
    options.imatrix = importance(source);
    options.threads = 2;
    for (const char* mix : {"IQ2_XXS", "IQ3_XXS", "Q2_K_S", "Q4_K_M", "Q4_0"}) {
        options.type = mix;
        const std::string target = folder.file(std::string(mix) + ".gguf");
        const auto plan = quantize(source, target, options);
        // The headers differ: ours names the importance matrix.
        const std::string written = read_file(target).substr(plan.header.size());
        const std::string expected = reference(source, folder.file("reference.gguf"), plan.file_type, options.imatrix.get());
        CHECK(expected.size() > written.size());
        CHECK(written == expected.substr(expected.size() - std::min(expected.size(), written.size())));
    }
}

TEST_CASE("quantizing an F16 file, and one that is quantised already, gives llama.cpp's bytes") {
    const TempDir folder;
    const std::string original = folder.file("f32.gguf");
    weights(/*layers=*/2, /*hidden=*/96).write(original);
    for (const char* between : {"F16", "BF16", "Q8_0"}) {
        QuantizeOptions options;
        options.threads = 2;
        options.type = between;
        const std::string source = folder.file(std::string(between) + ".gguf");
        quantize(original, source, options);
        options.type = "Q4_K_M";
        options.requantize = true;
        const std::string target = folder.file(std::string("from_") + between + ".gguf");
        const auto plan = quantize(source, target, options);
        llama_model_quantize_params params = llama_model_quantize_default_params();
        params.ftype = static_cast<llama_ftype>(plan.file_type);
        params.allow_requantize = true;
        const std::string reference_file = folder.file("reference.gguf");
        REQUIRE(llama_model_quantize(source.c_str(), reference_file.c_str(), &params) == 0);
        CHECK(read_file(target) == read_file(reference_file));
    }
}

TEST_CASE("a plan reads no weights: it is the same for a file of zeros that takes no room") {
    const TempDir folder;
    GgufBuilder gguf;
    gguf.set("general.architecture", "qwen3moe").set("qwen3moe.block_count", 1u).set("qwen3moe.context_length", 512u);
    gguf.set("qwen3moe.embedding_length", 2048u).set("qwen3moe.feed_forward_length", 512u).set("qwen3moe.attention.head_count", 4u);
    gguf.set("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6f).set("qwen3moe.expert_feed_forward_length", 8192u);
    gguf.set("qwen3moe.expert_count", 512u).set("qwen3moe.expert_used_count", 8u);
    gguf.tensor("token_embd.weight", {2048, 64}).tensor("blk.0.ffn_up_exps.weight", {2048, 8192, 512}, GGML_TYPE_F16);
    const std::string source = folder.file("large.gguf");
    gguf.write(source);
    const auto plan = plan_quantization(source, {});
    REQUIRE(plan.tensors.size() == 2);
    CHECK_EQ(plan.tensors[1].type, std::string("Q4_K"));
    CHECK_EQ(plan.tensors[1].bytes, std::uint64_t{2048ull * 8192 * 512 / 256 * 144});
}

TEST_CASE("weights that are not finite, or too large for the new type, are refused and named") {
    const TempDir folder;
    struct Case {
        float value;
        const char* type;
        const char* expected;
    };
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (const auto& each : {Case{std::nanf(""), "Q4_K_M", "not finite"}, Case{kInfinity, "F32", "not finite"},
                             Case{1e30f, "F16", "too large for F16"}, Case{1e30f, "Q8_0", "too large for Q8_0"}}) {
        auto gguf = weights(/*layers=*/1, /*hidden=*/64);
        auto values = random_values(kWidth * 16, 5);
        values[777] = each.value;
        gguf.tensor("blk.0.ffn_up_shexp.weight", {kWidth, 16}, values);
        const std::string source = folder.file("source.gguf");
        gguf.write(source);
        QuantizeOptions options;
        options.type = each.type;
        options.threads = 2;
        const std::string target = folder.file("target.gguf");
        std::filesystem::remove(target);
        const std::string message = CHECK_THROWS(QuantizeError, quantize(source, target, options));
        CHECK(message.find("blk.0.ffn_up_shexp.weight") != std::string::npos);
        CHECK(message.find(each.expected) != std::string::npos);
        // What is there is never written over.
        CHECK(CHECK_THROWS(FileError, quantize(source, target, options)).find("File exists") != std::string::npos);
    }
}
