#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "llama_moe/wait.h"

struct ggml_backend_device;

namespace llama_moe {

struct Device {
    std::string name;
    std::string description;
    std::string kind;     // "cpu", "gpu", "integrated_gpu" or "accelerator"
    std::string backend;  // "CPU", "CUDA", "Vulkan", "RPC", ...
    std::uint64_t memory_free = 0;   // bytes
    std::uint64_t memory_total = 0;  // bytes
};

// Starts llama.cpp once per process: log capture, abort handler, backends. Every entry point calls it.
void start_backend();

// What start_backend() does last, once: finds the backends that other packages bring and gives them to load_plugin(). It runs on
// the thread that comes first, while others wait for it; what it throws, that entry point throws, and the next one tries again.
void set_plugin_loader(std::function<void()> loader);

// Loads the library of a backend built for this llama.cpp, and registers its devices. False when it found none. For the loader
// above only.
bool load_plugin(const std::string& library);

std::vector<Device> devices(const Poll& poll = {});

// Connects to a llama.cpp RPC worker at "host:port" and registers its devices; a second call returns the same ones.
// `answer_timeout`: seconds after which a call that waits for the worker asks it whether it still answers.
constexpr double kAnswerTimeout = 300;
std::vector<Device> add_rpc_device(const std::string& endpoint, double answer_timeout = kAnswerTimeout, const Poll& poll = {});

// Serves this machine's devices to RPC clients; returns only by throwing.
[[noreturn]] void run_worker(const std::string& endpoint, int threads, const std::optional<std::string>& cache_dir);

// Name, version and build facts, for bug reports.
std::vector<std::pair<std::string, std::string>> build_info();

// Physical cores that this process may use: its CPU affinity, and a container's CPU quota where there is one.
int usable_cores();

}  // namespace llama_moe
