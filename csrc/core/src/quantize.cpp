#include "llama_moe/quantize.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <map>
#include <optional>
#include <regex>
#include <sstream>

#include "ggml.h"
#include "gguf_ptr.h"
#include "llama.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "native_thread.h"
#include "quantize_file.h"

namespace llama_moe {
namespace {

struct Mix {
    const char* name;
    llama_ftype file_type;
};

// What llama_ftype_get_default_type (llama-quant.cpp) knows, under the names that everybody uses for them.
constexpr Mix kMixes[] = {
    {"F32", LLAMA_FTYPE_ALL_F32},         {"F16", LLAMA_FTYPE_MOSTLY_F16},         {"BF16", LLAMA_FTYPE_MOSTLY_BF16},
    {"Q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},    {"Q6_K", LLAMA_FTYPE_MOSTLY_Q6_K},       {"Q5_K_M", LLAMA_FTYPE_MOSTLY_Q5_K_M},
    {"Q5_K_S", LLAMA_FTYPE_MOSTLY_Q5_K_S}, {"Q5_0", LLAMA_FTYPE_MOSTLY_Q5_0},      {"Q5_1", LLAMA_FTYPE_MOSTLY_Q5_1},
    {"Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M}, {"Q4_K_S", LLAMA_FTYPE_MOSTLY_Q4_K_S},  {"Q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},
    {"Q4_1", LLAMA_FTYPE_MOSTLY_Q4_1},    {"IQ4_NL", LLAMA_FTYPE_MOSTLY_IQ4_NL},   {"IQ4_XS", LLAMA_FTYPE_MOSTLY_IQ4_XS},
    {"MXFP4_MOE", LLAMA_FTYPE_MOSTLY_MXFP4_MOE}, {"Q3_K_L", LLAMA_FTYPE_MOSTLY_Q3_K_L}, {"Q3_K_M", LLAMA_FTYPE_MOSTLY_Q3_K_M},
    {"Q3_K_S", LLAMA_FTYPE_MOSTLY_Q3_K_S}, {"IQ3_M", LLAMA_FTYPE_MOSTLY_IQ3_M},    {"IQ3_S", LLAMA_FTYPE_MOSTLY_IQ3_S},
    {"IQ3_XS", LLAMA_FTYPE_MOSTLY_IQ3_XS}, {"IQ3_XXS", LLAMA_FTYPE_MOSTLY_IQ3_XXS}, {"Q2_K", LLAMA_FTYPE_MOSTLY_Q2_K},
    {"Q2_K_S", LLAMA_FTYPE_MOSTLY_Q2_K_S}, {"IQ2_M", LLAMA_FTYPE_MOSTLY_IQ2_M},    {"IQ2_S", LLAMA_FTYPE_MOSTLY_IQ2_S},
    {"IQ2_XS", LLAMA_FTYPE_MOSTLY_IQ2_XS}, {"IQ2_XXS", LLAMA_FTYPE_MOSTLY_IQ2_XXS}, {"IQ1_M", LLAMA_FTYPE_MOSTLY_IQ1_M},
    {"IQ1_S", LLAMA_FTYPE_MOSTLY_IQ1_S},  {"TQ2_0", LLAMA_FTYPE_MOSTLY_TQ2_0},     {"TQ1_0", LLAMA_FTYPE_MOSTLY_TQ1_0},
    {"Q2_0", LLAMA_FTYPE_MOSTLY_Q2_0},    {"Q1_0", LLAMA_FTYPE_MOSTLY_Q1_0},
};

// What ggml_quantize_chunk (ggml.c) can make.
constexpr ggml_type kTypes[] = {
    GGML_TYPE_F32,     GGML_TYPE_F16,   GGML_TYPE_BF16,  GGML_TYPE_Q8_0,  GGML_TYPE_Q6_K,    GGML_TYPE_Q5_K,  GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1,    GGML_TYPE_Q4_K,  GGML_TYPE_Q4_0,  GGML_TYPE_Q4_1,  GGML_TYPE_IQ4_NL,  GGML_TYPE_IQ4_XS, GGML_TYPE_MXFP4,
    GGML_TYPE_NVFP4,   GGML_TYPE_Q3_K,  GGML_TYPE_IQ3_S, GGML_TYPE_IQ3_XXS, GGML_TYPE_Q2_K,  GGML_TYPE_IQ2_S, GGML_TYPE_IQ2_XS,
    GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ1_M, GGML_TYPE_IQ1_S, GGML_TYPE_TQ2_0, GGML_TYPE_TQ1_0,   GGML_TYPE_Q2_0,  GGML_TYPE_Q1_0,
};

std::string upper(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
    return text;
}

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const auto& name : names) {
        text += (text.empty() ? "" : ", ") + name;
    }
    return text;
}

const Mix& find_mix(const std::string& name) {
    for (const auto& mix : kMixes) {
        if (upper(name) == mix.name) {
            return mix;
        }
    }
    throw InvalidOptionError("type: '" + name + "' is not known; it must be one of " + joined(mix_names()));
}

ggml_type find_type(const std::string& option, const std::string& name) {
    for (const auto type : kTypes) {
        if (upper(name) == type_name(type)) {
            return type;
        }
    }
    throw InvalidOptionError(option + ": '" + name + "' is not a tensor type; it must be one of " + joined(tensor_type_names()));
}

std::regex compile(const std::string& pattern) {
    try {
        return std::regex(pattern);
    } catch (const std::regex_error& error) {
        throw InvalidOptionError("'" + pattern + "' is not a regular expression: " + error.what());
    }
}

// ---- rules: what the options say, as regexes in the order in which llama.cpp tries them

struct Rule {
    std::string option;  // where it comes from, for messages
    std::string pattern;
    ggml_type type;
};

bool has_tensor(const GgufInfo& gguf, const std::string& name) {
    return std::any_of(gguf.tensors.begin(), gguf.tensors.end(), [&](const auto& tensor) { return tensor.name == name; });
}

std::vector<Rule> make_rules(const GgufInfo& gguf, const QuantizeOptions& options) {
    std::vector<Rule> rules;
    for (const auto& [pattern, type] : options.rules) {
        rules.push_back({"'" + pattern + "'", pattern, find_type("'" + pattern + "'", type)});
    }
    const auto add = [&](const char* option, const std::string& type, const char* pattern) {
        if (!type.empty()) {
            rules.push_back({option, pattern, find_type(option, type)});
        }
    };
    const bool tied = !has_tensor(gguf, "output.weight");
    if (tied && !options.output.empty() && !options.embedding.empty() && upper(options.output) != upper(options.embedding)) {
        throw InvalidOptionError("output='" + options.output + "' and embedding='" + options.embedding +
                                 "' contradict each other: this model's embedding is its output too");
    }
    add("experts", options.experts, R"(\.ffn_(up|down|gate|gate_up)_(ch|)exps\.weight$)");
    add("attention", options.attention, R"(\.(cross_)?attn_.*\.weight$)");
    add("output", options.output, tied ? R"(^token_embd\.weight$)" : R"(^output\.weight$)");
    add("embedding", options.embedding, R"(^(per_layer_)?token_embd\.weight$)");
    return rules;
}

// The rules that match each tensor first must have had something to do there, or be of the type that was there.
void check_rules(const std::vector<Rule>& rules, const QuantizePlan& plan) {
    std::vector<int> matched(rules.size()), effective(rules.size());
    std::vector<std::regex> compiled;
    for (const auto& rule : rules) {
        compiled.push_back(compile(rule.pattern));
    }
    for (const auto& tensor : plan.tensors) {
        bool taken = false;
        for (std::size_t i = 0; i < rules.size(); i++) {
            if (!std::regex_search(tensor.source.name, compiled[i])) {
                continue;
            }
            matched[i]++;
            const bool unchanged = tensor.type_id == tensor.source.type_id && tensor.type_id != rules[i].type && tensor.wanted_type.empty();
            effective[i] += taken || !unchanged ? 1 : 0;
            taken = true;
        }
    }
    for (std::size_t i = 0; i < rules.size(); i++) {
        if (matched[i] == 0) {
            throw InvalidOptionError(rules[i].option + " matches no tensor" +
                                     (rules[i].option == "experts" ? "; the model has no experts" : ", like '" + plan.tensors.front().source.name + "'"));
        }
        if (effective[i] == 0) {
            throw InvalidOptionError(rules[i].option + " matches no tensor that can be quantized; norms, biases and routers are kept as they are");
        }
    }
}

// ---- llama.cpp's choice of types

bool keeps_floats(llama_ftype file_type) {
    return file_type == LLAMA_FTYPE_ALL_F32 || file_type == LLAMA_FTYPE_MOSTLY_F16 || file_type == LLAMA_FTYPE_MOSTLY_BF16;
}

// What llama.cpp's dry run logs. It tells its choices in no other way: the functions of llama-ext.h that choose types forget that there is
// an importance matrix.
std::string dry_run(const std::string& source, const Mix& mix, std::vector<Rule> rules, bool has_imatrix) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.dry_run = true;
    params.ftype = mix.file_type;
    if (keeps_floats(mix.file_type) && !rules.empty()) {
        // llama.cpp follows rules only when the mix is a quantised one. The last rule gives the rest its type.
        rules.push_back({"type", "", find_type("type", mix.name)});
        params.ftype = LLAMA_FTYPE_MOSTLY_Q8_0;
    }
    std::vector<llama_model_tensor_override> overrides;
    for (const auto& rule : rules) {
        overrides.push_back({rule.pattern.c_str(), rule.type});
    }
    overrides.push_back({nullptr, GGML_TYPE_COUNT});
    params.tt_overrides = overrides.data();
    const float zero = 0.0f;
    const llama_model_imatrix_data imatrix[] = {{"", &zero, 1}, {nullptr, nullptr, 0}};
    params.imatrix = has_imatrix ? imatrix : nullptr;  // that there is one is all that matters here

    LogCapture log;
    const bool failed = llama_model_quantize(source.c_str(), "", &params) != 0;
    if (failed) {
        constexpr const char* kReason = "failed to quantize: ";
        const std::size_t at = log.text().rfind(kReason);
        std::string reason = at == std::string::npos ? "llama.cpp gave no reason" : log.text().substr(at + std::strlen(kReason));
        reason.erase(reason.find_last_not_of('\n') + 1);
        throw ModelLoadError("cannot quantize '" + source + "': " + reason);
    }
    return log.text();
}

struct Choice {
    std::string name;
    std::optional<ggml_type> type;  // nothing: as it is
    std::string wanted;
};

std::string trimmed(const std::string& text) {
    const std::size_t begin = text.find_first_not_of(' ');
    return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

// The text after the last `before` and up to the next `after`.
std::string between(const std::string& text, const std::string& before, const std::string& after) {
    const std::size_t begin = text.rfind(before);
    if (begin == std::string::npos) {
        return "";
    }
    const std::size_t start = begin + before.size();
    return trimmed(text.substr(start, text.find(after, start) - start));
}

std::optional<ggml_type> type_of_native_name(const std::string& name) {
    for (const auto type : kTypes) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    return std::nullopt;
}

// Reads lines like (llama-quant.cpp)
//   warning: blk.0.ffn_down_exps.weight - ncols 1408 not divisible by 256 (required for type q4_K) -> falling back to q5_0
//   [ 7/363] blk.0.ffn_down_exps.weight - [ 1408, 2048, 64, 1], type = f16, size = 352.00 MiB -> 121.00 MiB (q5_0)
// The second kind ends after its first size when a tensor stays as it is.
std::vector<Choice> read_choices(const std::string& log) {
    std::vector<Choice> choices;
    std::map<std::string, std::string> wanted;
    std::istringstream lines(log);
    for (std::string line; std::getline(lines, line);) {
        if (line.rfind("warning: ", 0) == 0 && line.find(" - ncols ") != std::string::npos) {
            const std::string name = trimmed(line.substr(9, line.rfind(" - ncols ") - 9));
            wanted[name] = upper(between(line, "(required for type", ")"));
        }
        const std::size_t shape = line.rfind(" - [");
        const std::size_t counted = line.find("] ");
        if (line.rfind("[", 0) != 0 || shape == std::string::npos || counted >= shape) {
            continue;
        }
        Choice choice;
        choice.name = trimmed(line.substr(counted + 2, shape - counted - 2));
        choice.wanted = wanted[choice.name];
        if (line.find(" -> ", shape) != std::string::npos) {
            const std::string type = between(line, "MiB (", ")");
            choice.type = type_of_native_name(type);
            if (!choice.type) {
                throw QuantizeError("llama.cpp chose the type '" + type + "' for '" + choice.name + "', which nothing here can make");
            }
        }
        choices.push_back(std::move(choice));
    }
    return choices;
}

// llama.cpp refuses to make these without an importance matrix (tensor_requires_imatrix in llama-quant.cpp); ggml itself aborts on some.
bool needs_imatrix(const QuantizedTensor& tensor, llama_ftype file_type) {
    if (tensor.type_id == tensor.source.type_id) {
        return false;
    }
    const auto type = static_cast<ggml_type>(tensor.type_id);
    if (ggml_quantize_requires_imatrix(type)) {
        return true;
    }
    const bool forgiving = tensor.source.role == TensorRole::embedding || tensor.source.role == TensorRole::output;
    switch (type) {
        case GGML_TYPE_IQ3_XXS:
        case GGML_TYPE_IQ2_S:
        case GGML_TYPE_IQ1_M: return !forgiving;
        case GGML_TYPE_Q2_K: return !forgiving && file_type == LLAMA_FTYPE_MOSTLY_Q2_K_S;
        default: return false;
    }
}

std::uint64_t row_count(const TensorInfo& tensor) {
    std::uint64_t rows = 1;
    for (std::size_t i = 1; i < tensor.shape.size(); i++) {
        rows *= static_cast<std::uint64_t>(tensor.shape[i]);
    }
    return rows;
}

void add_tensors(QuantizePlan& plan, const std::vector<Choice>& choices) {
    std::map<std::string, const TensorInfo*> sources;
    for (const auto& tensor : plan.source.tensors) {
        sources[tensor.name] = &tensor;
    }
    for (const auto& choice : choices) {
        const auto found = sources.find(choice.name);
        if (found == sources.end()) {
            throw QuantizeError("llama.cpp speaks of a tensor '" + choice.name + "', which '" + plan.source.path + "' does not have");
        }
        QuantizedTensor tensor;
        tensor.source = *found->second;
        tensor.type_id = choice.type.value_or(static_cast<ggml_type>(tensor.source.type_id));
        tensor.type = type_name(static_cast<ggml_type>(tensor.type_id));
        tensor.wanted_type = choice.wanted;
        tensor.bytes = choice.type ? ggml_row_size(*choice.type, tensor.source.shape.front()) * row_count(tensor.source) : tensor.source.bytes;
        tensor.needs_imatrix = needs_imatrix(tensor, static_cast<llama_ftype>(plan.file_type));
        plan.tensors.push_back(std::move(tensor));
        sources.erase(found);
    }
    if (!sources.empty()) {
        throw QuantizeError("llama.cpp says nothing about the tensor '" + sources.begin()->first + "' of '" + plan.source.path + "'");
    }
}

void check_requantizing(const QuantizePlan& plan, const QuantizeOptions& options) {
    for (const auto& tensor : plan.tensors) {
        if (!options.requantize && tensor.type_id != tensor.source.type_id && ggml_is_quantized(static_cast<ggml_type>(tensor.source.type_id))) {
            throw InvalidOptionError("'" + plan.source.path + "' is quantized already: '" + tensor.source.name + "' is " + tensor.source.type +
                                     ". Start from an F16, BF16 or F32 file, or requantize it (requantize=True, --requantize) and lose quality twice");
        }
    }
}

// ---- the header of the new file

void add_imatrix_keys(gguf_context* gguf, const Imatrix& imatrix) {
    gguf_set_val_str(gguf, "quantize.imatrix.file", imatrix.path.c_str());
    if (!imatrix.datasets.empty()) {
        gguf_set_val_str(gguf, "quantize.imatrix.dataset", imatrix.datasets.front().c_str());
    }
    gguf_set_val_u32(gguf, "quantize.imatrix.entries_count", static_cast<std::uint32_t>(imatrix.entries.size()));
    if (imatrix.chunk_count > 0) {
        gguf_set_val_u32(gguf, "quantize.imatrix.chunks_count", imatrix.chunk_count);
    }
}

void add_header(QuantizePlan& plan, const QuantizeOptions& options) {
    const GgufPtr gguf(gguf_init_empty());
    gguf_set_kv(gguf.get(), open_gguf(plan.source.files.front()).get());
    gguf_set_val_u32(gguf.get(), "general.quantization_version", GGML_QNT_VERSION);
    gguf_set_val_u32(gguf.get(), "general.file_type", static_cast<std::uint32_t>(plan.file_type));
    // The new file is one file, with the default alignment.
    for (const char* key : {"split.no", "split.count", "split.tensors.count", "general.alignment"}) {
        gguf_remove_key(gguf.get(), key);
    }
    if (options.imatrix) {
        add_imatrix_keys(gguf.get(), *options.imatrix);
    }
    const ggml_init_params params{ggml_tensor_overhead() * (plan.tensors.size() + 1), nullptr, /*no_alloc=*/true};
    const GgmlPtr tensors(ggml_init(params));
    plan.file_bytes = 0;
    for (const auto& tensor : plan.tensors) {
        const auto& shape = tensor.source.shape;
        ggml_tensor* meta = ggml_new_tensor(tensors.get(), static_cast<ggml_type>(tensor.type_id), static_cast<int>(shape.size()), shape.data());
        ggml_set_name(meta, tensor.source.name.c_str());
        gguf_add_tensor(gguf.get(), meta);
        plan.file_bytes += GGML_PAD(tensor.bytes, gguf_get_alignment(gguf.get()));
    }
    plan.header.resize(gguf_get_meta_size(gguf.get()));
    gguf_get_meta_data(gguf.get(), plan.header.data());
    plan.file_bytes += plan.header.size();
}

QuantizePlan make_plan(const std::string& source, const QuantizeOptions& options) {
    QuantizePlan plan;
    plan.source = read_gguf(source);
    const Mix& mix = find_mix(options.type);
    plan.file_type = mix.file_type;
    const auto rules = make_rules(plan.source, options);
    try {
        add_tensors(plan, read_choices(dry_run(source, mix, rules, options.imatrix != nullptr)));
    } catch (const NativeAbort& abort) {
        throw ModelLoadError("cannot quantize '" + source + "': " + abort.what());
    }
    check_rules(rules, plan);
    check_requantizing(plan, options);
    add_header(plan, options);
    return plan;
}

}  // namespace

std::vector<std::string> tensor_type_names() {
    std::vector<std::string> names;
    std::transform(std::begin(kTypes), std::end(kTypes), std::back_inserter(names), type_name);
    return names;
}

std::vector<std::string> mix_names() {
    std::vector<std::string> names;
    for (const auto& mix : kMixes) {
        names.emplace_back(mix.name);
    }
    return names;
}

void QuantizeOptions::validate() const {
    find_mix(type);
    if (threads < 0) {
        throw InvalidOptionError("threads must be 1 or more, not " + std::to_string(threads));
    }
    for (const auto& [pattern, rule_type] : rules) {
        compile(pattern);
        find_type("'" + pattern + "'", rule_type);
    }
    for (const auto& [option, value] :
         {std::pair{"experts", experts}, std::pair{"attention", attention}, std::pair{"output", output}, std::pair{"embedding", embedding}}) {
        if (!value.empty()) {
            find_type(option, value);
        }
    }
}

QuantizePlan plan_quantization(const std::string& source, const QuantizeOptions& options, const Poll& poll) {
    options.validate();
    start_backend();
    auto plan = std::make_shared<QuantizePlan>();
    run_native([=] { *plan = make_plan(source, options); }, poll);
    return std::move(*plan);
}

QuantizePlan quantize(const std::string& source, const std::string& target, const QuantizeOptions& options,
                      const std::function<void(float)>& on_progress, const Poll& poll) {
    options.validate();
    start_backend();
    struct Work {
        QuantizePlan plan;
        QuantizeControl control;
    };
    auto work = std::make_shared<Work>();
    // Created here: a thread that was left behind must not make a file that the caller has removed already.
    auto file = std::make_shared<OutputFile>(target);
    float reported = -1.0f;
    const auto report = [&] {
        const float share = work->control.share_done();
        if (on_progress && share > reported) {
            reported = share;
            on_progress(share);
        }
        if (poll) {
            poll();
        }
    };
    run_native(
        [=] {
            work->plan = make_plan(source, options);
            write_quantized(work->plan, options, *file, work->control);
            file->close();
        },
        report, [work] { work->control.cancelled.store(true); });
    if (on_progress && reported < 1.0f) {
        on_progress(1.0f);
    }
    return std::move(work->plan);
}

}  // namespace llama_moe
