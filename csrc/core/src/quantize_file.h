#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "llama_moe/quantize.h"

namespace llama_moe {

// What the thread that waits for a quantisation and those that do it have in common.
struct QuantizeControl {
    std::atomic<std::uint64_t> done_bytes{0};  // of the source's tensors
    std::atomic<std::uint64_t> all_bytes{0};   // 0: not known yet
    std::atomic<bool> cancelled{false};

    float share_done() const;
};

// A new file that is written at any place by any thread. All its functions throw FileError.
class OutputFile {
   public:
    explicit OutputFile(const std::string& path);  // which must not exist
    ~OutputFile();
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    void resize(std::uint64_t bytes);  // fails when the disk has less room
    void write(const void* data, std::size_t size, std::uint64_t offset);
    void close();

   private:
    std::string path_;
    int descriptor_;
};

// Does what the plan says: header, tensors, padding.
//
// The weights go through ggml's own conversions, on threads of ours, not through llama_model_quantize: that reports no progress, cannot be
// stopped before a tensor of gigabytes is done, and quantises on threads of its own, where an abort of ggml could not be caught. The types
// are its choice (plan_quantization), the bytes are the same: tests compare whole files.
void write_quantized(const QuantizePlan& plan, const QuantizeOptions& options, OutputFile& file, QuantizeControl& control);

}  // namespace llama_moe
