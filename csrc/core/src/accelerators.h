#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "hypothetical_device.h"
#include "llama_moe/placement.h"

namespace llama_moe {

// The accelerators that a model's layers go to, in llama.cpp's order: those of this machine and its workers that the options choose,
// and the hypothetical ones. Asking a remote device for its memory can block.
class Accelerators {
   public:
    struct Entry {
        ggml_backend_dev_t device;
        std::string name;
        std::uint64_t free;      // bytes that may be used
        std::uint64_t overhead;  // bytes of those that its driver will take
        bool shares_host;        // what it holds is host memory: an integrated GPU, and a device that cannot tell what it has
    };

    // Throws PlacementError for a device that is not there, has failed, or stands twice.
    explicit Accelerators(const ModelOptions& options);

    const std::vector<Entry>& entries() const { return entries_; }
    // The device of that name, "CPU" included; nullptr when the model does not use it.
    ggml_backend_dev_t find(const std::string& name) const;
    // Whether weights in host memory can be where a GPU reads them directly.
    bool offer_pinned_memory() const;

   private:
    std::vector<std::unique_ptr<HypotheticalDevice>> hypothetical_;
    std::vector<Entry> entries_;
};

// The real ones that the options choose.
std::vector<ggml_backend_dev_t> chosen_accelerators(const ModelOptions& options);

}  // namespace llama_moe
