#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>

#include "gguf_builder.h"
#include "llama_moe/error.h"
#include "llama_moe/gguf_file.h"
#include "temp_dir.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;
using test::contains;
using test::GgufBuilder;
using test::TempDir;

namespace {

// A header with one value of each kind and some tensors, small enough to be damaged at every byte.
GgufBuilder small_model() {
    GgufBuilder gguf;
    gguf.set("general.architecture", "llama")
        .set("llama.block_count", 2u)
        .set("llama.expert_count", 4u)
        .set("llama.expert_used_count", 2u)
        .set("test.flag", true)
        .set("test.ratio", 0.5f)
        .set("test.names", std::vector<std::string>{"one", "two"})
        .set("test.numbers", std::vector<std::uint32_t>{3, 1, 2})
        .tensor("token_embd.weight", {32, 8})
        .tensor("blk.0.attn_q.weight", {32, 32}, GGML_TYPE_Q8_0)
        .tensor("blk.1.ffn_up_exps.weight", {32, 16, 4}, GGML_TYPE_Q4_0)
        .tensor("output_norm.weight", {32})
        .tensor("output.weight", {32, 8}, GGML_TYPE_F16);
    return gguf;
}

const TensorInfo& tensor_named(const GgufInfo& info, const std::string& name) {
    const auto found = std::find_if(info.tensors.begin(), info.tensors.end(), [&](const auto& tensor) { return tensor.name == name; });
    REQUIRE(found != info.tensors.end());
    return *found;
}

// Reads bytes as a file: an answer or an Error, nothing else.
bool reads(const std::string& path) {
    try {
        read_gguf(path);
        return true;
    } catch (const ModelLoadError&) {
        return false;
    }
}

template <typename T>
void put(std::string& bytes, std::size_t at, T value) {
    std::memcpy(bytes.data() + at, &value, sizeof(value));
}

// Of the header: where the number of tensors and the number of key-value pairs stand.
constexpr std::size_t kTensorCountAt = 8;
constexpr std::size_t kPairCountAt = 16;
constexpr std::size_t kFirstPairAt = 24;

}  // namespace

TEST_CASE("read_gguf gives the architecture, the counts and the metadata") {
    const TempDir directory;
    small_model().write(directory.file("m.gguf"));
    const GgufInfo info = read_gguf(directory.file("m.gguf"));
    CHECK_EQ(info.path, directory.file("m.gguf"));
    CHECK_EQ(info.files, std::vector<std::string>{directory.file("m.gguf")});
    CHECK_EQ(info.architecture, "llama");
    CHECK_EQ(info.layer_count, 2);
    CHECK_EQ(info.nextn_layer_count, 0);
    CHECK_EQ(info.expert_count, 4);
    CHECK_EQ(info.experts_used, 2);
    CHECK_EQ(std::get<std::string>(info.metadata.at("general.architecture")), "llama");
    CHECK_EQ(std::get<std::uint64_t>(info.metadata.at("llama.block_count")), 2u);
    CHECK(std::get<bool>(info.metadata.at("test.flag")));
    CHECK_EQ(std::get<double>(info.metadata.at("test.ratio")), 0.5);
    const auto& names = std::get<MetadataArray>(info.metadata.at("test.names")).values;
    REQUIRE(names.size() == 2);
    CHECK_EQ(std::get<std::string>(names[1]), "two");
    CHECK_EQ(std::get<std::uint64_t>(std::get<MetadataArray>(info.metadata.at("test.numbers")).values.at(0)), 3u);
    CHECK_EQ(info.architecture_integer("block_count", -7), 2);
    CHECK_EQ(info.architecture_integer("absent", -7), -7);
}

TEST_CASE("read_gguf reads a number of every width") {
    const TempDir directory;
    auto gguf = small_model();
    gguf_set_val_u8(gguf.get(), "n.u8", 255);
    gguf_set_val_i8(gguf.get(), "n.i8", -128);
    gguf_set_val_u16(gguf.get(), "n.u16", 65535);
    gguf_set_val_i16(gguf.get(), "n.i16", -32768);
    gguf_set_val_i32(gguf.get(), "n.i32", -2147483647);
    gguf_set_val_u64(gguf.get(), "n.u64", UINT64_MAX);
    gguf_set_val_i64(gguf.get(), "n.i64", INT64_MIN);
    gguf_set_val_f64(gguf.get(), "n.f64", 1e300);
    gguf.write(directory.file("m.gguf"));
    const GgufInfo info = read_gguf(directory.file("m.gguf"));
    CHECK_EQ(std::get<std::uint64_t>(info.metadata.at("n.u8")), 255u);
    CHECK_EQ(std::get<std::int64_t>(info.metadata.at("n.i8")), -128);
    CHECK_EQ(std::get<std::uint64_t>(info.metadata.at("n.u16")), 65535u);
    CHECK_EQ(std::get<std::int64_t>(info.metadata.at("n.i16")), -32768);
    CHECK_EQ(std::get<std::int64_t>(info.metadata.at("n.i32")), -2147483647);
    CHECK_EQ(std::get<std::uint64_t>(info.metadata.at("n.u64")), UINT64_MAX);
    CHECK_EQ(std::get<std::int64_t>(info.metadata.at("n.i64")), INT64_MIN);
    CHECK_EQ(std::get<double>(info.metadata.at("n.f64")), 1e300);
}

TEST_CASE("read_gguf gives each tensor's type, shape, size, role and layer") {
    const TempDir directory;
    small_model().write(directory.file("m.gguf"));
    const GgufInfo info = read_gguf(directory.file("m.gguf"));
    REQUIRE(info.tensors.size() == 5);
    const auto& experts = tensor_named(info, "blk.1.ffn_up_exps.weight");
    CHECK_EQ(experts.type, "Q4_0");
    CHECK_EQ(experts.shape, (std::vector<std::int64_t>{32, 16, 4}));
    CHECK_EQ(experts.bytes, 16u * 4u * 18u);  // a block of 32 in Q4_0 is 18 bytes
    CHECK(experts.role == TensorRole::experts);
    CHECK_EQ(experts.layer, 1);
    CHECK(tensor_named(info, "token_embd.weight").role == TensorRole::embedding);
    CHECK_EQ(tensor_named(info, "token_embd.weight").layer, -1);
    CHECK(tensor_named(info, "output.weight").role == TensorRole::output);
    CHECK(tensor_named(info, "output_norm.weight").role == TensorRole::weights);
    CHECK_EQ(tensor_named(info, "output_norm.weight").shape, std::vector<std::int64_t>{32});
    CHECK(tensor_named(info, "blk.0.attn_q.weight").role == TensorRole::weights);
    std::uint64_t bytes = 0;
    for (const auto& tensor : info.tensors) {
        bytes += tensor.bytes;
    }
    CHECK_EQ(info.size_bytes, bytes);
    CHECK_EQ(info.parameter_count, 32u * 8 + 32 * 32 + 32 * 16 * 4 + 32 + 32 * 8);
}

TEST_CASE("is_expert_tensor knows the names of routed experts and of nothing else") {
    for (const char* projection : {"up", "down", "gate", "gate_up"}) {
        for (const char* kind : {"exps", "chexps"}) {
            for (const char* suffix : {".weight", ".bias", ".scale"}) {
                CHECK(is_expert_tensor("blk.3.ffn_" + std::string(projection) + "_" + kind + suffix));
            }
        }
    }
    for (const char* name : {"blk.3.ffn_up.weight", "blk.3.ffn_gate_inp.weight", "blk.3.ffn_up_shexp.weight", "blk.3.ffn_gate_inp_shexp.weight",
                             "blk.3.exp_probs_b.bias", "blk.3.ffn_norm_exps.weight", "blk.3.attn_q.weight", "ffn_up_exps", ""}) {
        CHECK(!is_expert_tensor(name));
    }
}

TEST_CASE("read_gguf leaves the vocabulary out of the metadata") {
    const TempDir directory;
    auto gguf = small_model();
    gguf.set("tokenizer.ggml.tokens", std::vector<std::string>(1025, "t")).set("test.long", std::vector<std::uint32_t>(1024, 1));
    gguf.write(directory.file("m.gguf"));
    const GgufInfo info = read_gguf(directory.file("m.gguf"));
    CHECK_EQ(info.metadata.count("tokenizer.ggml.tokens"), 0u);
    CHECK_EQ(std::get<MetadataArray>(info.metadata.at("test.long")).values.size(), 1024u);
}

TEST_CASE("a per-layer array counts as its largest entry") {
    const TempDir directory;
    auto gguf = small_model();
    gguf.set("llama.attention.head_count_kv", std::vector<std::uint32_t>{0, 8, 4});
    gguf.write(directory.file("m.gguf"));
    CHECK_EQ(read_gguf(directory.file("m.gguf")).architecture_integer("attention.head_count_kv", 0), 8);
}

TEST_CASE("read_gguf says what is wrong with what is not a model file") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    CHECK_EQ(CHECK_THROWS(FileNotFoundError, read_gguf(path)), "no such file: '" + path + "'");
    CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf(directory.path())), "is a directory"));
    CHECK_THROWS(FileNotFoundError, read_gguf(""));
    for (const std::string bytes : {"", "GG", "not a model at all", "ggufggufgguf"}) {
        test::write_file(path, bytes);
        CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf(path)), "is not a GGUF file"));
    }
    CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf("/dev/null")), "/dev/null"));
    REQUIRE(::mkfifo(directory.file("fifo").c_str(), 0600) == 0);
    CHECK_THROWS(ModelLoadError, read_gguf(directory.file("fifo")));  // and does not wait for a writer
}

TEST_CASE("read_gguf refuses a header cut off at any byte") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    const std::string header = small_model().header();
    for (std::size_t size = 0; size < header.size(); size++) {
        test::write_file(path, header.substr(0, size));
        CHECK_THROWS(ModelLoadError, read_gguf(path));
    }
}

TEST_CASE("read_gguf refuses data cut off at any byte, and says which tensor") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    const auto gguf = small_model();
    gguf.write(path);
    const std::size_t last = gguf.header().size() + gguf_get_tensor_offset(gguf.get(), 4) + gguf_get_tensor_size(gguf.get(), 4);
    std::filesystem::resize_file(path, last);
    CHECK(reads(path));  // what pads the file is not needed
    for (std::size_t size = last - 1; size > gguf.header().size(); size -= 7) {
        std::filesystem::resize_file(path, size);
        const auto message = CHECK_THROWS(ModelLoadError, read_gguf(path));
        CHECK(contains(message, "is truncated: tensor '"));
    }
    std::filesystem::resize_file(path, last - 1);
    CHECK_EQ(CHECK_THROWS(ModelLoadError, read_gguf(path)), "'" + path + "' is truncated: tensor 'output.weight' ends at byte " +
                                                                std::to_string(last) + ", the file has " + std::to_string(last - 1));
}

TEST_CASE("read_gguf refuses a file without an architecture or with one of the wrong type") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    GgufBuilder without;
    without.set("general.name", "x");
    without.write(path);
    CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf(path)), "general.architecture"));
    auto numeric = small_model();
    numeric.set("general.architecture", 7u);
    numeric.write(path);
    CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf(path)), "general.architecture"));
}

TEST_CASE("keys of the wrong type count as absent") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    auto gguf = small_model();
    gguf.set("llama.expert_count", "many").set("llama.expert_used_count", 2.0f);
    gguf.write(path);
    const GgufInfo info = read_gguf(path);
    CHECK_EQ(info.expert_count, 0);
    CHECK_EQ(info.experts_used, 0);
}

TEST_CASE("read_gguf refuses counts that no model has") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    const auto refused = [&](const char* key, auto set_value) {
        auto gguf = small_model();
        set_value(gguf.get(), key);
        gguf.write(path);
        CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf(path)), key));
    };
    for (const char* key : {"llama.block_count", "llama.expert_count", "llama.expert_used_count", "llama.nextn_predict_layers"}) {
        refused(key, [](auto* gguf, auto* name) { gguf_set_val_u32(gguf, name, 4'000'000'000u); });
        refused(key, [](auto* gguf, auto* name) { gguf_set_val_u64(gguf, name, UINT64_MAX); });
        refused(key, [](auto* gguf, auto* name) { gguf_set_val_i32(gguf, name, -1); });
    }
    refused("llama.nextn_predict_layers", [](auto* gguf, auto* name) { gguf_set_val_u32(gguf, name, 3); });  // of 2 layers
}

TEST_CASE("read_gguf refuses huge counts at once, without the memory they ask for") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    const std::string header = small_model().header();
    for (const std::size_t at : {kTensorCountAt, kPairCountAt, kFirstPairAt}) {  // the last is the length of the first key
        for (const std::uint64_t count : {std::uint64_t{1} << 20, std::uint64_t{1} << 31, std::uint64_t{1} << 40, std::uint64_t{1} << 62, UINT64_MAX}) {
            auto bytes = header;
            put(bytes, at, count);
            test::write_file(path, bytes);
            CHECK_THROWS(ModelLoadError, read_gguf(path));
        }
    }
    // The length of an array: behind its key, the type "array" and the type of its elements.
    const std::size_t key = header.find("test.numbers");
    REQUIRE(key != std::string::npos);
    for (const std::uint64_t count : {std::uint64_t{1} << 28, std::uint64_t{1} << 40, UINT64_MAX}) {
        auto bytes = header;
        put(bytes, key + std::strlen("test.numbers") + 8, count);
        test::write_file(path, bytes);
        CHECK_THROWS(ModelLoadError, read_gguf(path));
    }
    // The shape of a tensor, whose size overflows 64 bits.
    const std::size_t name = header.find("output_norm.weight");
    REQUIRE(name != std::string::npos);
    for (const std::int64_t extent : {std::int64_t{1} << 40, INT64_MAX, INT64_MAX - 31, std::int64_t{-1}, INT64_MIN}) {
        auto bytes = header;
        put(bytes, name + std::strlen("output_norm.weight") + 4, extent);
        test::write_file(path, bytes);
        CHECK_THROWS(ModelLoadError, read_gguf(path));
    }
}

TEST_CASE("read_gguf answers or refuses whatever is changed in a header") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    small_model().write(path);
    const std::string original = test::read_file(path);
    const std::size_t header_size = small_model().header().size();
    std::mt19937 random(6);
    int refused = 0;
    constexpr int kRounds = 6'000;
    for (int round = 0; round < kRounds; round++) {
        auto bytes = original;
        for (auto count = 1 + random() % 4; count > 0; count--) {
            const std::size_t at = 4 + random() % (header_size - 12);  // behind the magic
            switch (random() % 5) {
                case 0: bytes[at] = static_cast<char>(random()); break;
                case 1: bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ (1u << random() % 8)); break;
                case 2: put(bytes, at, static_cast<std::uint64_t>(random()) << random() % 33); break;
                case 3: put(bytes, at, static_cast<std::uint32_t>(random() % 16)); break;
                default: bytes.erase(at, 1 + random() % 8); break;
            }
        }
        if (random() % 8 == 0) {
            bytes.resize(random() % bytes.size());
        }
        test::write_file(path, bytes);
        refused += reads(path) ? 0 : 1;
    }
    CHECK(refused > kRounds / 2 && refused < kRounds);  // most changes hurt; some, in a name or a number, do not
}

TEST_CASE("read_gguf changes each byte of a header to each of some values and survives") {
    const TempDir directory;
    const std::string path = directory.file("m.gguf");
    small_model().write(path);
    const std::string original = test::read_file(path);
    for (std::size_t at = 4; at < small_model().header().size(); at++) {
        for (const int value : {0x00, 0x01, 0x7F, 0x80, 0xFF}) {
            auto bytes = original;
            bytes[at] = static_cast<char>(value);
            test::write_file(path, bytes);
            reads(path);
        }
    }
}

TEST_CASE("read_gguf reads all files of a split model") {
    const TempDir directory;
    for (std::uint32_t part = 0; part < 2; part++) {
        GgufBuilder gguf;
        if (part == 0) {
            gguf.set("general.architecture", "llama").set("llama.block_count", 2u);
        }
        gguf.set("split.no", part).set("split.count", 2u).tensor("blk." + std::to_string(part) + ".attn_q.weight", {32, 32});
        gguf.write(directory.file("m-0000" + std::to_string(part + 1) + "-of-00002.gguf"));
    }
    const auto info = read_gguf(directory.file("m-00001-of-00002.gguf"));
    CHECK_EQ(info.files, (std::vector<std::string>{directory.file("m-00001-of-00002.gguf"), directory.file("m-00002-of-00002.gguf")}));
    CHECK_EQ(info.tensors.size(), 2u);
    CHECK_EQ(info.tensors.at(1).layer, 1);
    CHECK_EQ(info.size_bytes, 2u * 32 * 32 * 4);

    CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf(directory.file("m-00002-of-00002.gguf"))), "give its first file"));
    std::filesystem::rename(directory.file("m-00001-of-00002.gguf"), directory.file("other.gguf"));
    CHECK(contains(CHECK_THROWS(ModelLoadError, read_gguf(directory.file("other.gguf"))), "give its first file"));
    std::filesystem::rename(directory.file("other.gguf"), directory.file("m-00001-of-00002.gguf"));
    std::filesystem::remove(directory.file("m-00002-of-00002.gguf"));
    CHECK(contains(CHECK_THROWS(FileNotFoundError, read_gguf(directory.file("m-00001-of-00002.gguf"))), "m-00002-of-00002.gguf"));
}
