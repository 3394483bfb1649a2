#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ggml.h"
#include "gguf.h"

namespace test {

// Writes GGUF files with ggml's own writer.
class GgufBuilder {
   public:
    GgufBuilder();

    GgufBuilder& set(const std::string& key, const std::string& value);
    GgufBuilder& set(const std::string& key, std::uint32_t value);
    GgufBuilder& set(const std::string& key, float value);
    GgufBuilder& set(const std::string& key, bool value);
    GgufBuilder& set(const std::string& key, const std::vector<std::string>& values);
    GgufBuilder& set(const std::string& key, const std::vector<std::uint32_t>& values);
    GgufBuilder& set(const std::string& key, const std::vector<float>& values);
    GgufBuilder& set(const std::string& key, const std::vector<std::int32_t>& values);
    GgufBuilder& set(const std::string& key, const char* value) { return set(key, std::string(value)); }

    // A tensor of zeros, which take no room on disk.
    GgufBuilder& tensor(const std::string& name, const std::vector<std::int64_t>& shape, ggml_type type = GGML_TYPE_F32);
    GgufBuilder& tensor(const std::string& name, const std::vector<std::int64_t>& shape, std::vector<float> values);

    gguf_context* get() const { return gguf_.get(); }
    // The header alone, as it stands before the tensors' data.
    std::string header() const;
    void write(const std::string& path) const;

   private:
    struct GgufDeleter {
        void operator()(gguf_context* gguf) const { gguf_free(gguf); }
    };
    struct GgmlDeleter {
        void operator()(ggml_context* ggml) const { ggml_free(ggml); }
    };

    std::unique_ptr<gguf_context, GgufDeleter> gguf_;
    std::unique_ptr<ggml_context, GgmlDeleter> ggml_;
    std::vector<std::vector<float>> values_;  // of each tensor; empty: zeros
};

}  // namespace test
