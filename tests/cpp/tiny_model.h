// A Mixture-of-Experts model of a few hundred kilobytes, with random weights from a fixed seed.
#pragma once

#include <memory>
#include <string>

#include "gguf_builder.h"
#include "llama_moe/model.h"

namespace test {

// Its vocabulary: <unk>, <s>, </s>, then one token for each byte, then one for a space, which such vocabularies write as
// U+2581.
constexpr int kBos = 1;
constexpr int kEos = 2;
constexpr int kFirstByte = 3;
constexpr int kSpace = kFirstByte + 256;
constexpr int kVocabSize = kSpace + 1;

// The token of a one-byte character.
constexpr int byte_token(char byte) {
    return byte == ' ' ? kSpace : kFirstByte + static_cast<unsigned char>(byte);
}

struct TinyModelOptions {
    int layers = 2;
    int experts = 4;  // 0: a dense model
    int experts_used = 2;
    int context_length = 1024;
    bool tied_output = false;  // no output tensor: the embedding is used
    int more_tokens = 0;       // behind the vocabulary; with any, the embedding is zero
    unsigned seed = 1;
};

GgufBuilder tiny_model(const TinyModelOptions& options = {});

// A file with that model, written once and removed when the program ends.
std::string tiny_model_file(const TinyModelOptions& options = {});
void remove_tiny_model_files();

// The model loaded on the CPU.
std::shared_ptr<llama_moe::Model> load_tiny_model(const TinyModelOptions& options = {});

}  // namespace test
