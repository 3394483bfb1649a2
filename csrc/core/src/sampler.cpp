#include "sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "llama_moe/error.h"

namespace llama_moe {
namespace {

std::string number_text(double value) {
    std::string text = std::to_string(value);
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') {
        text.pop_back();
    }
    return text;
}

void require(bool valid, const char* name, double value, const char* expected) {
    if (!valid || !std::isfinite(value)) {
        throw InvalidOptionError(std::string(name) + " is " + (std::isfinite(value) ? number_text(value) : "not finite") + "; it must be " + expected);
    }
}

bool is_probability(float value) {
    return value >= 0.0f && value <= 1.0f;
}

std::vector<llama_logit_bias> biases(const SamplingOptions& options, const SamplingVocabulary& vocabulary) {
    std::vector<llama_logit_bias> result;
    for (const auto& [token, bias] : options.logit_bias) {
        if (token < 0 || token >= vocabulary.size) {
            throw InvalidOptionError("logit_bias names token " + std::to_string(token) + "; the vocabulary has the tokens 0 to " +
                                     std::to_string(vocabulary.size - 1));
        }
        result.push_back({token, bias});
    }
    if (options.ignore_eos) {
        for (const auto token : vocabulary.end_tokens) {
            result.push_back({token, -std::numeric_limits<float>::infinity()});
        }
    }
    return result;
}

std::uint32_t seed_of(const SamplingOptions& options) {
    return options.seed ? *options.seed : std::random_device{}();
}

}  // namespace

void SamplingOptions::validate() const {
    require(!max_tokens || *max_tokens >= 1, "max_tokens", max_tokens.value_or(1), "1 or more, or None for no limit");
    require(temperature >= 0, "temperature", temperature, "0 (greedy) or more");
    require(top_k >= 0, "top_k", top_k, "0 (all) or more");
    require(top_p > 0 && top_p <= 1, "top_p", top_p, "more than 0 and at most 1");
    require(is_probability(min_p), "min_p", min_p, "from 0 to 1");
    require(typical_p > 0 && typical_p <= 1, "typical_p", typical_p, "more than 0 and at most 1");
    require(true, "top_n_sigma", top_n_sigma, "finite; 0 or less is off");
    require(repeat_penalty > 0, "repeat_penalty", repeat_penalty, "more than 0; 1 is off");
    require(true, "presence_penalty", presence_penalty, "finite");
    require(true, "frequency_penalty", frequency_penalty, "finite");
    require(penalty_window >= -1, "penalty_window", penalty_window, "-1 (the whole context), 0 (off) or more");
    require(is_probability(xtc_probability), "xtc_probability", xtc_probability, "from 0 to 1");
    require(is_probability(xtc_threshold), "xtc_threshold", xtc_threshold, "from 0 to 1");
    require(dry_multiplier >= 0, "dry_multiplier", dry_multiplier, "0 (off) or more");
    require(dry_base >= 1, "dry_base", dry_base, "1 or more");
    require(dry_allowed_length >= 0, "dry_allowed_length", dry_allowed_length, "0 or more");
    require(dry_penalty_window >= -1, "dry_penalty_window", dry_penalty_window, "-1 (the whole context), 0 (off) or more");
    require(mirostat >= 0 && mirostat <= 2, "mirostat", mirostat, "0 (off), 1 or 2");
    require(mirostat_tau > 0, "mirostat_tau", mirostat_tau, "more than 0");
    require(mirostat_eta > 0, "mirostat_eta", mirostat_eta, "more than 0");
    require(!logprobs || (*logprobs >= 0 && *logprobs <= 100), "logprobs", logprobs.value_or(0), "from 0 to 100, or None");
    for (const auto& text : stop) {
        if (text.empty()) {
            throw InvalidOptionError("stop has an empty string; it would end every text at once");
        }
    }
    for (const auto& [token, bias] : logit_bias) {
        if (std::isnan(bias) || bias == std::numeric_limits<float>::infinity()) {
            throw InvalidOptionError("logit_bias[" + std::to_string(token) + "] is " + (std::isnan(bias) ? "NaN" : "infinite") +
                                     "; it must be finite, or negative infinity to ban the token");
        }
    }
}

SamplingVocabulary::SamplingVocabulary(const llama_model* model)
    : vocab(llama_model_get_vocab(model)), size(llama_vocab_n_tokens(vocab)), trained_context(llama_model_n_ctx_train(model)) {
    for (std::int32_t token = 0; token < size; token++) {
        if (llama_vocab_is_eog(vocab, token)) {
            end_tokens.push_back(token);
        }
    }
}

// The order is that of llama.cpp's own default chain (common/sampling.cpp), so that equal settings mean the same.
Sampler::Sampler(const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size) : vocab_size_(vocabulary.size) {
    auto bias = biases(options, vocabulary);
    const int window = options.penalty_window < 0 ? context_size : options.penalty_window;
    const bool penalties = window > 0 && (options.repeat_penalty != 1.0f || options.presence_penalty != 0.0f || options.frequency_penalty != 0.0f);
    const bool dry = options.dry_multiplier > 0.0f && options.dry_penalty_window != 0;
    const bool greedy = options.temperature <= 0.0f;
    if (greedy && !penalties && !dry) {
        biases_ = std::move(bias);
        return;
    }
    remembers_ = penalties || dry;
    auto params = llama_sampler_chain_default_params();
    params.no_perf = true;
    chain_.reset(llama_sampler_chain_init(params));
    const auto add = [this](llama_sampler* sampler) { llama_sampler_chain_add(chain_.get(), sampler); };
    if (!bias.empty()) {
        add(llama_sampler_init_logit_bias(vocabulary.size, static_cast<int>(bias.size()), bias.data()));
    }
    if (penalties) {
        add(llama_sampler_init_penalties(vocabulary.size, window, options.repeat_penalty, options.frequency_penalty, options.presence_penalty));
    }
    if (dry) {
        std::vector<const char*> breakers;
        for (const auto& breaker : options.dry_sequence_breakers) {
            breakers.push_back(breaker.c_str());
        }
        const int dry_window = options.dry_penalty_window < 0 ? context_size : options.dry_penalty_window;
        add(llama_sampler_init_dry(vocabulary.vocab, options.dry_multiplier, options.dry_base, options.dry_allowed_length, dry_window,
                                   breakers.data(), breakers.size()));
    }
    if (greedy) {
        add(llama_sampler_init_greedy());
        return;
    }
    const std::uint32_t seed = seed_of(options);
    if (options.mirostat != 0) {
        add(llama_sampler_init_temp(options.temperature));
        add(options.mirostat == 1 ? llama_sampler_init_mirostat(vocabulary.size, seed, options.mirostat_tau, options.mirostat_eta, 100)
                                  : llama_sampler_init_mirostat_v2(seed, options.mirostat_tau, options.mirostat_eta));
        return;
    }
    if (options.top_n_sigma > 0.0f) {
        add(llama_sampler_init_top_n_sigma(options.top_n_sigma));
    }
    if (options.top_k > 0) {
        add(llama_sampler_init_top_k(options.top_k));
    }
    if (options.typical_p < 1.0f) {
        add(llama_sampler_init_typical(options.typical_p, 1));
    }
    if (options.top_p < 1.0f) {
        add(llama_sampler_init_top_p(options.top_p, 1));
    }
    if (options.min_p > 0.0f) {
        add(llama_sampler_init_min_p(options.min_p, 1));
    }
    if (options.xtc_probability > 0.0f) {
        add(llama_sampler_init_xtc(options.xtc_probability, options.xtc_threshold, 1, seed));
    }
    add(llama_sampler_init_temp(options.temperature));
    add(llama_sampler_init_dist(seed));
}

void Sampler::accept_prompt(const std::vector<std::int32_t>& tokens) {
    if (remembers_) {
        for (const auto token : tokens) {
            llama_sampler_accept(chain_.get(), token);
        }
    }
}

std::int32_t Sampler::sample(const float* logits) {
    if (!chain_) {
        if (biases_.empty()) {
            return argmax(logits, vocab_size_);
        }
        biased_logits_.assign(logits, logits + vocab_size_);
        for (const auto& [token, bias] : biases_) {
            biased_logits_[static_cast<std::size_t>(token)] += bias;
        }
        return argmax(biased_logits_.data(), vocab_size_);
    }
    candidates_.resize(static_cast<std::size_t>(vocab_size_));
    for (int i = 0; i < vocab_size_; i++) {
        candidates_[static_cast<std::size_t>(i)] = {i, logits[i], 0.0f};
    }
    llama_token_data_array array{candidates_.data(), candidates_.size(), -1, false};
    llama_sampler_apply(chain_.get(), &array);
    if (array.selected < 0 || std::isnan(array.data[array.selected].logit)) {
        throw DecodeError("the samplers chose no token; the model's logits may be NaN");
    }
    const std::int32_t token = array.data[array.selected].id;
    llama_sampler_accept(chain_.get(), token);
    return token;
}

std::int32_t argmax(const float* values, int count) {
    constexpr int kLanes = 16;  // independent maxima, so that the compiler can use vector instructions
    std::array<float, kLanes> best;
    best.fill(-std::numeric_limits<float>::infinity());
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int lane = 0; lane < kLanes; lane++) {
            const auto at = static_cast<std::size_t>(lane);
            best[at] = values[i + lane] > best[at] ? values[i + lane] : best[at];
        }
    }
    float maximum = *std::max_element(best.begin(), best.end());
    for (; i < count; i++) {
        maximum = std::max(maximum, values[i]);
    }
    const float* found = std::find(values, values + count, maximum);
    if (found == values + count) {
        throw DecodeError("the model's logits are NaN");
    }
    return static_cast<std::int32_t>(found - values);
}

SampledLogprobs log_probabilities(const float* logits, int count, std::int32_t token, int top) {
    const float maximum = logits[argmax(logits, count)];
    double sum = 0;
    for (int i = 0; i < count; i++) {
        sum += std::exp(static_cast<double>(logits[i] - maximum));
    }
    const auto log_sum = static_cast<float>(std::log(sum)) + maximum;
    SampledLogprobs result{logits[token] - log_sum, {}};
    const int kept = std::min(top, count);
    if (kept > 0) {
        std::vector<std::int32_t> order(static_cast<std::size_t>(count));
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + kept, order.end(),
                          [logits](auto a, auto b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); });
        for (int i = 0; i < kept; i++) {
            const auto id = order[static_cast<std::size_t>(i)];
            result.top.emplace_back(id, logits[id] - log_sum);
        }
    }
    return result;
}

}  // namespace llama_moe
