#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "llama_moe/gguf_file.h"
#include "llama_moe/memory.h"
#include "llama_moe/placement.h"
#include "llama_moe/wait.h"

namespace llama_moe {

// Something that lives on a model and is closed with it.
class ModelUser {
   public:
    virtual ~ModelUser() = default;
    virtual void close() = 0;
};

struct LoadedModel;  // the llama.cpp model; kept by contexts and engines, so that it outlives them

class Model {
   public:
    using Progress = std::function<void(float)>;  // 0 to 1, on the calling thread; may throw to stop the load

    // Loads on a thread of ours while the caller waits. An exception from `poll` or `on_progress` stops the load.
    static std::shared_ptr<Model> load(const std::string& path, const ModelOptions& options, const PlacementPolicy& policy,
                                       const Progress& on_progress = {}, const Poll& poll = {});
    ~Model();
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    const std::string& path() const { return path_; }
    const GgufInfo& gguf() const { return gguf_; }
    const std::vector<TensorPlacement>& placement() const { return placement_; }
    const std::string& description() const { return description_; }
    int vocab_size() const { return vocab_size_; }
    int context_length() const { return context_length_; }
    int embedding_length() const { return embedding_length_; }
    int bos_token() const { return bos_token_; }
    int eos_token() const { return eos_token_; }
    const std::optional<std::string>& chat_template() const { return chat_template_; }
    const std::string& expert_kernels() const { return expert_kernels_; }
    std::vector<MemoryRow> memory() const;

    std::vector<std::int32_t> tokenize(const std::string& text, bool add_special, bool parse_special) const;
    std::string detokenize(const std::vector<std::int32_t>& tokens, bool special) const;
    // The bytes a token stands for; they need not be whole UTF-8 characters.
    std::string token_bytes(std::int32_t token, bool special) const;
    bool is_end_of_generation(std::int32_t token) const;

    // The loaded model, for a context that is being made. Throws ClosedError after close().
    std::shared_ptr<LoadedModel> acquire() const;
    void add_user(const std::shared_ptr<ModelUser>& user);

    // Closes the contexts and engines on this model and frees it. Idempotent.
    void close();
    bool closed() const;

   private:
    Model();

    std::string path_;
    GgufInfo gguf_;
    std::vector<TensorPlacement> placement_;
    std::string description_;
    int vocab_size_ = 0;
    int context_length_ = 0;
    int embedding_length_ = 0;
    int bos_token_ = -1;
    int eos_token_ = -1;
    std::optional<std::string> chat_template_;
    std::string expert_kernels_;  // "llama_moe" or "ggml"

    mutable std::mutex mutex_;  // guards what follows; never held while llama.cpp runs
    std::shared_ptr<LoadedModel> loaded_;
    std::vector<std::weak_ptr<ModelUser>> users_;
};

}  // namespace llama_moe
