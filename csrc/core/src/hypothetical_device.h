#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "ggml-backend.h"

namespace llama_moe {

// A GPU that is not there: a ggml device that says what it could hold and compute, and allocates and computes nothing. llama.cpp's
// dry run over it gives what its own formulas say of a GPU of that size. It behaves as ggml's CUDA devices do.
class HypotheticalDevice {
   public:
    HypotheticalDevice(const std::string& name, std::uint64_t memory);
    ~HypotheticalDevice();
    HypotheticalDevice(const HypotheticalDevice&) = delete;
    HypotheticalDevice& operator=(const HypotheticalDevice&) = delete;

    // Valid as long as this object, which must outlive every model and context on it.
    ggml_backend_dev_t get() const;

   private:
    struct State;
    std::unique_ptr<State> state_;
};

bool is_hypothetical(ggml_backend_dev_t device);

}  // namespace llama_moe
