#include "llama_moe/model.h"

#include <algorithm>
#include <atomic>

#include "accelerators.h"
#include "host_memory.h"
#include "llama_moe/live_objects.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/log.h"
#include "llama_moe/process.h"
#include "loaded_model.h"
#include "machine.h"
#include "native_thread.h"
#include "placement_rules.h"

namespace llama_moe {
namespace {

std::string describe(const llama_model* model) {
    char text[256];
    const int size = llama_model_desc(model, text, sizeof(text));
    return size > 0 ? std::string(text) : "";
}

}  // namespace

std::shared_ptr<Model> Model::load(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy,
                                   const Progress& on_progress, const Poll& poll) {
    start_backend();
    struct Result {
        std::shared_ptr<Model> model;
        LoadControl control;
    };
    auto result = std::make_shared<Result>();
    result->model.reset(new Model);
    if (on_progress) {
        on_progress(0.0f);
    }
    float reported = 0.0f;
    const auto report = [&] {
        const float progress = result->control.progress.load(std::memory_order_relaxed);
        if (on_progress && progress > reported && progress < 1.0f) {
            reported = progress;
            on_progress(progress);
        }
        if (poll) {
            poll();
        }
    };
    run_native(
        [result, path, options, policy] {
            Model& model = *result->model;
            model.path_ = path;
            model.gguf_ = read_gguf(path);
            const auto accelerators = std::make_shared<const Accelerators>(options);
            auto placement = resolve_placement(model.gguf_, options, policy, accelerators, result->control.cancelled);
            check_host_memory(options, placement, *accelerators, policy.ram.value_or(available_ram()));
            if (!placement.summary.empty()) {
                log_line(LogLevel::info, placement.summary);
            }
            auto loaded = load_model(model.gguf_, options, placement, accelerators, result->control);
            model.placement_ = std::move(placement.tensors);
            model.description_ = describe(loaded->model);
            model.vocab_size_ = llama_vocab_n_tokens(loaded->vocab);
            model.context_length_ = llama_model_n_ctx_train(loaded->model);
            model.embedding_length_ = llama_model_n_embd(loaded->model);
            model.bos_token_ = llama_vocab_bos(loaded->vocab);
            model.eos_token_ = llama_vocab_eos(loaded->vocab);
            if (const char* text = llama_model_chat_template(loaded->model, nullptr)) {
                model.chat_template_ = text;
            }
            model.expert_kernels_ = loaded->packed ? "llama_moe" : "ggml";
            model.loaded_ = std::move(loaded);
        },
        report, [result] { result->control.cancelled.store(true); }, chosen_accelerators(options));
    if (on_progress) {
        on_progress(1.0f);
    }
    return std::shared_ptr<Model>(result, result->model.get());
}

Model::Model() {
    live_objects().models++;
}

Model::~Model() {
    close();
    live_objects().models--;
}

std::shared_ptr<LoadedModel> Model::acquire() const {
    require_same_process("the model");
    std::lock_guard<std::mutex> lock(mutex_);
    if (!loaded_) {
        throw ClosedError("the model '" + path_ + "' is closed");
    }
    return loaded_;
}

void Model::add_user(const std::shared_ptr<ModelUser>& user) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!loaded_) {  // closed while the user was being made: nobody would close it
        throw ClosedError("the model '" + path_ + "' is closed");
    }
    users_.erase(std::remove_if(users_.begin(), users_.end(), [](const auto& weak) { return weak.expired(); }), users_.end());
    users_.push_back(user);
}

void Model::close() {
    if (forked()) {
        return;
    }
    std::shared_ptr<LoadedModel> loaded;
    std::vector<std::weak_ptr<ModelUser>> users;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        loaded.swap(loaded_);
        users.swap(users_);
    }
    for (const auto& weak : users) {
        if (const auto user = weak.lock()) {
            user->close();
        }
    }
}

bool Model::closed() const {
    if (forked()) {
        return true;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    return loaded_ == nullptr;
}

std::vector<MemoryRow> Model::memory() const {
    return acquire()->memory;
}

std::vector<std::int32_t> Model::tokenize(const std::string& text, bool add_special, bool parse_special) const {
    const auto loaded = acquire();
    const NativeScope scope;
    if (text.size() > INT32_MAX / 2) {
        throw InvalidOptionError("the text has " + std::to_string(text.size()) + " bytes; at most 1 GiB can be tokenized at once");
    }
    const auto size = static_cast<std::int32_t>(text.size());
    std::vector<std::int32_t> tokens(text.size() + 8);
    auto count = llama_tokenize(loaded->vocab, text.data(), size, tokens.data(), static_cast<std::int32_t>(tokens.size()), add_special, parse_special);
    if (count < 0) {
        tokens.resize(static_cast<std::size_t>(-count));
        count = llama_tokenize(loaded->vocab, text.data(), size, tokens.data(), -count, add_special, parse_special);
    }
    tokens.resize(static_cast<std::size_t>(std::max(count, 0)));
    return tokens;
}

std::string Model::detokenize(const std::vector<std::int32_t>& tokens, bool special) const {
    const auto loaded = acquire();
    const NativeScope scope;
    for (const auto token : tokens) {
        if (token < 0 || token >= vocab_size_) {
            throw InvalidOptionError("token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(vocab_size_));
        }
    }
    const auto count = static_cast<std::int32_t>(tokens.size());
    std::string text(tokens.size() * 8 + 16, '\0');
    auto size = llama_detokenize(loaded->vocab, tokens.data(), count, text.data(), static_cast<std::int32_t>(text.size()), false, special);
    if (size < 0) {
        text.resize(static_cast<std::size_t>(-size));
        size = llama_detokenize(loaded->vocab, tokens.data(), count, text.data(), -size, false, special);
    }
    text.resize(static_cast<std::size_t>(std::max(size, 0)));
    return text;
}

std::string Model::token_bytes(std::int32_t token, bool special) const {
    if (token < 0 || token >= vocab_size_) {
        throw InvalidOptionError("token " + std::to_string(token) + " is not in the vocabulary of " + std::to_string(vocab_size_));
    }
    const auto loaded = acquire();
    const NativeScope scope;
    std::string text(32, '\0');
    auto size = llama_token_to_piece(loaded->vocab, token, text.data(), static_cast<std::int32_t>(text.size()), 0, special);
    if (size < 0) {
        text.resize(static_cast<std::size_t>(-size));
        size = llama_token_to_piece(loaded->vocab, token, text.data(), -size, 0, special);
    }
    text.resize(static_cast<std::size_t>(std::max(size, 0)));
    return text;
}

bool Model::is_end_of_generation(std::int32_t token) const {
    const auto loaded = acquire();
    return llama_vocab_is_eog(loaded->vocab, token);
}

}  // namespace llama_moe
