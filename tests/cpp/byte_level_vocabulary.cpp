#include "byte_level_vocabulary.h"

#include "gguf_builder.h"
#include "llama_moe/device.h"
#include "temp_dir.h"

namespace test {
namespace {

// GPT-2's character for a byte: itself if it can be printed, else the next free one from U+0100 on.
std::string character_of(unsigned char byte) {
    const auto plain = [](int value) { return (value >= 0x21 && value <= 0x7E) || (value >= 0xA1 && value <= 0xAC) || value >= 0xAE; };
    int character = byte;
    if (!plain(byte)) {
        character = 0x100;
        for (int other = 0; other < byte; other++) {
            character += plain(other) ? 0 : 1;
        }
    }
    if (character < 0x80) {
        return {static_cast<char>(character)};
    }
    return {static_cast<char>(0xC0 | character >> 6), static_cast<char>(0x80 | (character & 0x3F))};
}

}  // namespace

llama_model_ptr load_byte_level_vocabulary(const std::vector<std::string>& texts, const std::vector<std::string>& controls) {
    std::vector<std::string> tokens;
    std::vector<std::int32_t> types;
    const auto add = [&](const std::string& bytes) {
        std::string token;
        for (const char byte : bytes) {
            token += character_of(static_cast<unsigned char>(byte));
        }
        tokens.push_back(token);
        types.push_back(1);  // normal
    };
    for (int byte = 0; byte < 256; byte++) {
        add({static_cast<char>(byte)});
    }
    for (const auto& text : texts) {
        add(text);
    }
    const auto end = static_cast<std::uint32_t>(tokens.size());
    for (const auto& name : controls) {
        tokens.push_back(name);
        types.push_back(3);  // control
    }
    const TempDir directory;
    const std::string path = directory.file("vocabulary.gguf");
    GgufBuilder gguf;
    gguf.set("general.architecture", "llama")
        .set("llama.block_count", 1u)
        .set("llama.context_length", 64u)
        .set("llama.embedding_length", 64u)
        .set("llama.feed_forward_length", 64u)
        .set("llama.attention.head_count", 1u)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f)
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "default")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.merges", std::vector<std::string>{"a b"})
        .set("tokenizer.ggml.eos_token_id", end)
        .set("tokenizer.ggml.bos_token_id", end);
    gguf.write(path);
    llama_moe::start_backend();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    return llama_model_ptr(llama_model_load_from_file(path.c_str(), params));
}

}  // namespace test
