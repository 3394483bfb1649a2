#include "sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "grammar_text.h"
#include "llama_moe/error.h"

namespace llama_moe {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// llama.cpp's top-k is a partial sort up to this many, and another algorithm, with another order of equals, above.
constexpr int kMaxPartialSort = 128;
// How many of the most likely tokens a grammar looks at before it looks at the whole vocabulary.
constexpr int kLikely = 256;

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
    const auto ban = [&result](const std::vector<std::int32_t>& tokens) {
        for (const auto token : tokens) {
            result.push_back({token, -kInfinity});
        }
    };
    ban(vocabulary.suppressed_tokens);
    if (options.ignore_eos) {
        ban(vocabulary.end_tokens);
    }
    return result;
}

std::uint32_t seed_of(const SamplingOptions& options) {
    return options.seed ? *options.seed : std::random_device{}();
}

llama_sampler_ptr make_chain() {
    auto params = llama_sampler_chain_default_params();
    params.no_perf = true;
    return llama_sampler_ptr(llama_sampler_chain_init(params));
}

std::optional<Grammar> make_grammar(const SamplingOptions& options, const SamplingVocabulary& vocabulary) {
    if (options.grammar || options.json_schema) {
        ChatGrammar grammar;
        grammar.text = options.grammar ? *options.grammar : grammar_of_schema(*options.json_schema);
        return std::make_optional<Grammar>(grammar, vocabulary.vocab, vocabulary.trie(), /*names_tokens=*/false);
    }
    if (!options.chat_grammar.text.empty()) {
        return std::make_optional<Grammar>(options.chat_grammar, vocabulary.vocab, vocabulary.trie(), /*names_tokens=*/true);
    }
    return std::nullopt;
}

void all_candidates(const float* values, int count, std::vector<llama_token_data>& candidates) {
    candidates.resize(static_cast<std::size_t>(count));
    for (int i = 0; i < count; i++) {
        candidates[static_cast<std::size_t>(i)] = {i, values[i], 0.0f};
    }
}

bool has_larger_logit(const llama_token_data& a, const llama_token_data& b) {
    return a.logit > b.logit;
}

bool any_larger(const float* values, int count, float bound) {
    int any = 0;  // not a bool, and no early end, so that the compiler can use vector instructions
    for (int i = 0; i < count; i++) {
        any |= values[i] > bound ? 1 : 0;
    }
    return any != 0;
}

}  // namespace

void SamplingOptions::validate() const {
    require(!max_tokens || *max_tokens >= 1, "max_tokens", max_tokens.value_or(1), "1 or more, or None for no limit");
    require(temperature >= 0, "temperature", temperature, "0 (greedy) or more");
    require(dynatemp_range >= 0, "dynatemp_range", dynatemp_range, "0 (off) or more");
    require(dynatemp_exponent > 0, "dynatemp_exponent", dynatemp_exponent, "more than 0");
    require(top_k >= 0, "top_k", top_k, "0 (all) or more");
    require(top_p > 0 && top_p <= 1, "top_p", top_p, "more than 0 and at most 1");
    require(is_probability(min_p), "min_p", min_p, "from 0 to 1");
    require(typical_p > 0 && typical_p <= 1, "typical_p", typical_p, "more than 0 and at most 1");
    require(true, "top_n_sigma", top_n_sigma, "finite; 0 or less is off");
    require(min_keep >= 0, "min_keep", min_keep, "0 or more");
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
    require(adaptive_target <= 1, "adaptive_target", adaptive_target, "from 0 to 1, or negative for off");
    require(adaptive_decay >= 0 && adaptive_decay <= 0.99f, "adaptive_decay", adaptive_decay, "from 0 to 0.99");
    if (adaptive_target >= 0 && mirostat != 0) {
        throw InvalidOptionError("adaptive_target and mirostat both choose the token; give one of them");
    }
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
    if (grammar && json_schema) {
        throw InvalidOptionError("grammar and json_schema are both given; give one of them");
    }
    if (grammar) {
        check_grammar_size(*grammar);
    }
    if (json_schema) {
        check_grammar_size(grammar_of_schema(*json_schema));
    }
}

SamplingVocabulary::SamplingVocabulary(const llama_model* model)
    : vocab(llama_model_get_vocab(model)), size(llama_vocab_n_tokens(vocab)), trained_context(llama_model_n_ctx_train(model)) {
    for (std::int32_t token = 0; token < size; token++) {
        if (llama_vocab_is_eog(vocab, token)) {
            end_tokens.push_back(token);
        }
    }
    const auto usual = std::find(end_tokens.begin(), end_tokens.end(), llama_vocab_eos(vocab));
    if (usual != end_tokens.end()) {
        std::rotate(end_tokens.begin(), usual, usual + 1);
    }
    std::int32_t count = 0;
    if (const auto* suppressed = llama_vocab_get_suppress_tokens(vocab, &count)) {
        suppressed_tokens.assign(suppressed, suppressed + count);
    }
}

std::shared_ptr<const TokenTrie> SamplingVocabulary::trie() const {
    std::call_once(trie_once_, [this] { trie_ = std::make_shared<const TokenTrie>(vocab); });
    return trie_;
}

// The order is that of llama.cpp's own default chain (common/sampling.cpp), so that equal settings mean the same.
Sampler::Sampler(const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size)
    : vocab_size_(vocabulary.size),
      end_tokens_(vocabulary.end_tokens),
      biases_(biases(options, vocabulary)),
      grammar_(make_grammar(options, vocabulary)) {
    add_penalties(options, vocabulary, context_size);
    add_choice(options, vocabulary);
}

void Sampler::add_penalties(const SamplingOptions& options, const SamplingVocabulary& vocabulary, int context_size) {
    // Nothing is ever longer than the context, and llama.cpp allocates what it is told.
    const int window = options.penalty_window < 0 ? context_size : std::min(options.penalty_window, context_size);
    const int dry_window = options.dry_penalty_window < 0 ? context_size : std::min(options.dry_penalty_window, context_size);
    const bool penalties = window > 0 && (options.repeat_penalty != 1.0f || options.presence_penalty != 0.0f || options.frequency_penalty != 0.0f);
    const bool dry = options.dry_multiplier > 0.0f && dry_window > 0;
    if (!penalties && !dry) {
        return;
    }
    penalties_ = make_chain();
    window_ = std::max(penalties ? window : 0, dry ? dry_window : 0);
    has_occurred_.resize(static_cast<std::size_t>(vocab_size_));
    if (penalties) {
        llama_sampler_chain_add(penalties_.get(), llama_sampler_init_penalties(vocabulary.size, window, options.repeat_penalty,
                                                                               options.frequency_penalty, options.presence_penalty));
    }
    if (dry) {
        std::vector<const char*> breakers;
        for (const auto& breaker : options.dry_sequence_breakers) {
            breakers.push_back(breaker.c_str());
        }
        llama_sampler_chain_add(penalties_.get(),
                                llama_sampler_init_dry(vocabulary.vocab, options.dry_multiplier, options.dry_base, options.dry_allowed_length,
                                                       dry_window, breakers.data(), breakers.size()));
    }
}

void Sampler::add_choice(const SamplingOptions& options, const SamplingVocabulary& vocabulary) {
    const bool greedy = options.temperature <= 0.0f;
    if (greedy && !options.infill) {
        return;
    }
    chain_ = make_chain();
    const auto add = [this](llama_sampler* sampler) { llama_sampler_chain_add(chain_.get(), sampler); };
    const std::uint32_t seed = seed_of(options);
    if (options.mirostat != 0 && !greedy) {
        add(llama_sampler_init_temp(options.temperature));
        add(options.mirostat == 1 ? llama_sampler_init_mirostat(vocabulary.size, seed, options.mirostat_tau, options.mirostat_eta, 100)
                                  : llama_sampler_init_mirostat_v2(seed, options.mirostat_tau, options.mirostat_eta));
        return;
    }
    const auto min_keep = static_cast<std::size_t>(options.min_keep);
    if (options.top_n_sigma > 0.0f) {
        add(llama_sampler_init_top_n_sigma(options.top_n_sigma));
    } else {
        top_k_ = options.top_k;
    }
    if (options.top_k > 0) {
        add(llama_sampler_init_top_k(options.top_k));
    }
    if (options.typical_p < 1.0f) {
        add(llama_sampler_init_typical(options.typical_p, min_keep));
    }
    if (options.top_p < 1.0f) {
        add(llama_sampler_init_top_p(options.top_p, min_keep));
    }
    if (options.min_p > 0.0f) {
        add(llama_sampler_init_min_p(options.min_p, min_keep));
    }
    if (options.infill) {
        if (vocabulary.end_tokens.empty()) {
            throw InvalidOptionError("infill needs a vocabulary with an end-of-generation token; this one has none");
        }
        add(llama_sampler_init_infill(vocabulary.vocab));
    }
    if (greedy) {
        add(llama_sampler_init_greedy());
        return;
    }
    if (options.xtc_probability > 0.0f) {
        add(llama_sampler_init_xtc(options.xtc_probability, options.xtc_threshold, min_keep, seed));
    }
    add(llama_sampler_init_temp_ext(options.temperature, options.dynatemp_range, options.dynatemp_exponent));
    add(options.adaptive_target >= 0 ? llama_sampler_init_adaptive_p(options.adaptive_target, options.adaptive_decay, seed)
                                     : llama_sampler_init_dist(seed));
}

void Sampler::accept_prompt(const std::vector<std::int32_t>& tokens) {
    if (penalties_) {
        const auto count = std::min(tokens.size(), static_cast<std::size_t>(window_));
        std::for_each(tokens.end() - static_cast<std::ptrdiff_t>(count), tokens.end(), [this](auto token) { remember(token); });
    }
}

void Sampler::remember(std::int32_t token) {
    llama_sampler_accept(penalties_.get(), token);
    const auto at = static_cast<std::size_t>(token);
    if (!has_occurred_[at]) {
        has_occurred_[at] = true;
        occurred_.push_back(token);
    }
}

std::int32_t Sampler::sample(const float* logits) {
    const float* values = adjusted(logits);
    std::int32_t token = choose(values);
    const bool constrained = grammar_ && grammar_->applies();
    // Most choices fit: to ask about one of them is cheaper than to ask about the whole vocabulary.
    if (constrained && !grammar_->allows(token)) {
        token = choose_allowed(values);
    }
    if (penalties_) {
        remember(token);
    }
    if (grammar_) {
        grammar_->accept(token);
    }
    if (chain_) {
        llama_sampler_accept(chain_.get(), token);
    }
    return token;
}

// The logits with biases and penalties.
const float* Sampler::adjusted(const float* logits) {
    if (biases_.empty() && occurred_.empty()) {
        return logits;
    }
    adjusted_logits_.assign(logits, logits + vocab_size_);
    for (const auto& [token, bias] : biases_) {
        adjusted_logits_[static_cast<std::size_t>(token)] += bias;
    }
    if (occurred_.empty()) {
        return adjusted_logits_.data();
    }
    // llama.cpp's penalties look every candidate up, so they are given only those that they can change.
    candidates_.clear();
    for (const auto token : occurred_) {
        candidates_.push_back({token, adjusted_logits_[static_cast<std::size_t>(token)], 0.0f});
    }
    llama_token_data_array array{candidates_.data(), candidates_.size(), -1, false};
    llama_sampler_apply(penalties_.get(), &array);
    for (const auto& candidate : candidates_) {
        adjusted_logits_[static_cast<std::size_t>(candidate.id)] = candidate.logit;
    }
    return adjusted_logits_.data();
}

std::int32_t Sampler::choose(const float* values) {
    if (!chain_) {
        return argmax(values, vocab_size_);
    }
    const bool select = top_k_ > 0 && top_k_ <= kMaxPartialSort;
    if (select) {
        top_candidates(values, vocab_size_, top_k_, candidates_);
    } else {
        all_candidates(values, vocab_size_, candidates_);
    }
    return apply_chain(select);
}

// The same choice among the tokens that the grammar allows.
std::int32_t Sampler::choose_allowed(const float* values) {
    const int wanted = chain_ ? top_k_ : 1;  // of the most likely; 0: it takes all of them to choose
    bool sorted = wanted > 0 && wanted <= kMaxPartialSort;
    if (sorted) {
        top_candidates(values, vocab_size_, std::max(kLikely, 2 * wanted), candidates_);
        grammar_->filter(candidates_);
        sorted = candidates_.size() >= static_cast<std::size_t>(wanted);
    }
    if (!sorted) {
        all_candidates(values, vocab_size_, candidates_);
        grammar_->filter(candidates_);
    }
    const auto banned = [](const llama_token_data& candidate) { return candidate.logit == -kInfinity; };
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(), banned), candidates_.end());
    if (candidates_.empty()) {
        return ending_token();
    }
    if (!chain_) {
        return std::min_element(candidates_.begin(), candidates_.end(), has_larger_logit)->id;
    }
    const std::int32_t token = apply_chain(sorted);
    // The infill sampler ends the text by itself when it likes nothing else.
    return grammar_->allows(token) ? token : ending_token();
}

std::int32_t Sampler::apply_chain(bool sorted) {
    llama_token_data_array array{candidates_.data(), candidates_.size(), -1, sorted};
    llama_sampler_apply(chain_.get(), &array);
    if (array.selected < 0 || std::isnan(array.data[array.selected].logit)) {
        throw DecodeError("the samplers chose no token; the model's logits may be NaN");
    }
    return array.data[array.selected].id;
}

// Where the text may end and the grammar leaves nothing else, it ends, also with ignore_eos.
std::int32_t Sampler::ending_token() {
    for (const auto token : end_tokens_) {
        if (grammar_->allows(token)) {
            return token;
        }
    }
    throw DecodeError("no token of the vocabulary is left that the grammar allows here; see logit_bias and the grammar");
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

// std::partial_sort passes over what is not larger than the k-th largest value so far. So may whoever gathers its input:
// `bound` is that value when it is set, and below it until it is set again.
void top_candidates(const float* values, int count, int k, std::vector<llama_token_data>& candidates) {
    constexpr int kBlock = 64;
    k = std::min(k, count);
    candidates.clear();
    std::vector<llama_token_data> largest;
    float bound = -kInfinity;
    std::size_t next_bound = 0;
    for (int begin = 0; begin < count;) {
        const int end = begin == 0 ? k : std::min(begin + kBlock, count);
        if (begin == 0 || any_larger(values + begin, end - begin, bound)) {
            for (std::int32_t i = begin; i < end; i++) {
                if (begin == 0 || values[i] > bound) {
                    candidates.push_back({i, values[i], 0.0f});
                }
            }
        }
        if (candidates.size() > next_bound) {
            largest = candidates;
            std::partial_sort(largest.begin(), largest.begin() + k, largest.end(), has_larger_logit);
            bound = largest[static_cast<std::size_t>(k) - 1].logit;
            next_bound = 2 * candidates.size() + kBlock;
        }
        begin = end;
    }
    std::partial_sort(candidates.begin(), candidates.begin() + k, candidates.end(), has_larger_logit);
    candidates.resize(static_cast<std::size_t>(k));
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
