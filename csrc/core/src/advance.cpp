#include "advance.h"

#include <algorithm>
#include <cmath>

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

std::string token_text(const Request& request, const SamplingVocabulary& vocabulary, std::int32_t token) {
    const auto& preserved = request.preserved_tokens;
    const bool special = std::find(preserved.begin(), preserved.end(), token) != preserved.end();
    char buffer[64];
    const auto size = llama_token_to_piece(vocabulary.vocab, token, buffer, sizeof(buffer), 0, special);
    if (size >= 0) {
        return {buffer, static_cast<std::size_t>(size)};
    }
    std::string text(static_cast<std::size_t>(-size), '\0');
    llama_token_to_piece(vocabulary.vocab, token, text.data(), -size, 0, special);
    return text;
}

std::vector<GeneratedToken> with_logprobs(Request& request, const SamplingVocabulary& vocabulary, std::vector<TextPiece> pieces) {
    std::vector<GeneratedToken> tokens;
    tokens.reserve(pieces.size());
    for (auto& piece : pieces) {
        GeneratedToken token{piece.token, std::move(piece.text), std::nullopt, {}};
        auto& logprobs = request.sampled_logprobs;
        while (!logprobs.empty() && logprobs.front().first < piece.index) {
            logprobs.pop_front();
        }
        if (!logprobs.empty() && logprobs.front().first == piece.index) {
            token.logprob = logprobs.front().second.logprob;
            for (const auto& [id, logprob] : logprobs.front().second.top) {
                Utf8Assembler utf8;
                std::string text = utf8.push(token_text(request, vocabulary, id));
                text += utf8.finish();
                token.top.push_back({id, std::move(text), logprob});
            }
        }
        tokens.push_back(std::move(token));
    }
    return tokens;
}

const float* checked(const float* row) {
    if (row == nullptr) {
        throw DecodeError("llama.cpp gave no logits");
    }
    return row;
}

void normalise(float* row, int size) {
    double sum = 0;
    for (int i = 0; i < size; i++) {
        sum += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    }
    const auto scale = static_cast<float>(sum > 0 ? 1.0 / std::sqrt(sum) : 0.0);
    for (int i = 0; i < size; i++) {
        row[i] *= scale;
    }
}

// One token; returns it, or -1 with `advance.end` set when it ended the generation and is not part of it.
std::int32_t generate_one(Request& request, const SamplingVocabulary& vocabulary, const float* logits, int room, Advance& advance) {
    const std::int32_t token = request.sampler.sample(checked(logits));
    if (request.generated == 0) {
        request.first_token = Clock::now();
    }
    if (llama_vocab_is_eog(vocabulary.vocab, token)) {
        deliver_held(request, vocabulary);
        advance.end = "stop";
        return -1;
    }
    if (request.logprobs) {
        request.sampled_logprobs.emplace_back(static_cast<std::size_t>(request.generated),
                                              log_probabilities(logits, vocabulary.size, token, *request.logprobs));
    }
    request.generated++;
    request.tokens.push_back(token);
    advance.tokens++;
    request.deliver(with_logprobs(request, vocabulary, request.assembler.push(token, token_text(request, vocabulary, token))));
    if (request.assembler.stopped()) {
        advance.end = "stop";
    } else if ((request.max_tokens && request.generated >= *request.max_tokens) || room <= 0) {
        deliver_held(request, vocabulary);
        advance.end = request.assembler.stopped() ? "stop" : "length";
    }
    return token;
}

}  // namespace

void deliver_held(Request& request, const SamplingVocabulary& vocabulary) {
    request.deliver(with_logprobs(request, vocabulary, request.assembler.finish()));
}

Advance generate(Request& request, const SamplingVocabulary& vocabulary, const std::vector<const float*>& rows, const std::vector<std::int32_t>& draft,
                 int room) {
    Advance advance;
    try {
        for (std::size_t i = 0; i < rows.size(); i++) {
            const std::int32_t token = generate_one(request, vocabulary, rows[i], room - static_cast<int>(i), advance);
            if (!advance.end.empty() || i >= draft.size() || token != draft[i]) {
                break;
            }
            advance.accepted++;
        }
    } catch (...) {
        advance.error = std::current_exception();
    }
    return advance;
}

Advance score(Request& request, const SamplingVocabulary& vocabulary, const std::vector<const float*>& rows, std::size_t first) {
    Advance advance;
    try {
        for (std::size_t i = 0; i < rows.size(); i++) {
            request.values.push_back(log_probabilities(checked(rows[i]), vocabulary.size, request.tokens[first + i], 0).logprob);
        }
    } catch (...) {
        advance.error = std::current_exception();
    }
    return advance;
}

void embed(Request& request, const float* row, int size, std::size_t index) {
    auto& values = request.values;
    const bool last = index + 1 == request.tokens.size();
    const auto& options = request.embedding;
    if (options.pooling == Pooling::none || values.empty()) {
        values.insert(values.end(), row, row + size);
    } else if (options.pooling == Pooling::last) {
        std::copy(row, row + size, values.begin());
    } else if (options.pooling == Pooling::mean) {
        for (int i = 0; i < size; i++) {
            values[static_cast<std::size_t>(i)] += row[i];
        }
    }
    if (!last) {
        return;
    }
    if (options.pooling == Pooling::mean) {
        for (auto& value : values) {
            value /= static_cast<float>(request.tokens.size());
        }
    }
    if (options.normalise) {
        for (std::size_t at = 0; at < values.size(); at += static_cast<std::size_t>(size)) {
            normalise(values.data() + at, size);
        }
    }
}

}  // namespace llama_moe
