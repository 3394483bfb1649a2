#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama_moe/placement.h"
#include "llama_moe/wait.h"

namespace llama_moe {

// How a device is measured: as llama.cpp would use it.
struct RateOptions {
    std::string device = "CPU";
    int threads = 0;     // of the CPU backend; 0: one per usable core
    // How weights lie in host memory, and so what computes with them: "packed" for our expert kernels, "repacked" in a layout of
    // llama.cpp's, or "plain" as in the file. A type for which there is no such layout has the next of these.
    std::string layout = "plain";

    void validate() const;
};

// A matrix-vector product whose speed is measured.
struct ProductKind {
    std::string type;          // ggml's name of the weights' number format
    std::int64_t columns = 0;  // numbers in a row: short rows take longer for each byte
    bool experts = false;      // of MUL_MAT_ID, with a quarter of the experts used; else of MUL_MAT
};

struct ProductRates {
    std::vector<double> bytes_per_second;  // of weights, for each kind; 0 where the device cannot compute it
    bool disturbed = false;                // other programs took the cores from the measurement
};

struct DeviceRates {
    double memory_bytes_per_second = 0;     // plain reads of host memory by all threads; 0 for an accelerator
    double copy_bytes_per_second = 0;       // from host memory into the device's; 0 for the CPU
    double attention_bytes_per_second = 0;  // keys and values, counted once for each query head; 0: the device has no flash attention
    double operation_seconds = 0;           // one small operation of a graph
    double graph_seconds = 0;               // starting a graph and waiting for its end
    double crossing_seconds = 0;            // one step from this device to the CPU or back, with a small vector; 0 for the CPU
    bool disturbed = false;                 // other programs took the cores from the measurement
};

struct DiskRate {
    double bytes_per_second = 0;
    std::string method;  // "direct" (past the page cache), "dropped" (pages dropped first) or "cached" (perhaps from the page cache)
    std::uint64_t bytes_read = 0;
};

// All of these run on a thread of their own; `poll` may throw to leave early.

ProductRates measure_products(const RateOptions& options, const std::vector<ProductKind>& kinds, const Poll& poll = {});
DeviceRates measure_device(const RateOptions& options, const Poll& poll = {});
DiskRate measure_disk(const std::string& path, const Poll& poll = {});

// The layout of weights in host memory that are loaded with these options. An accelerator that offers pinned memory makes llama.cpp leave
// them as they are.
std::string weight_layout(const ModelOptions& options);

}  // namespace llama_moe
