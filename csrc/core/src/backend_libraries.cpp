#include "backend_libraries.h"

#include <dlfcn.h>

#include <filesystem>
#include <memory>
#include <mutex>
#include <system_error>

#include "ggml-backend.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"

namespace llama_moe {
namespace {

namespace fs = std::filesystem;

// What every library of ours is called (third_party/CMakeLists.txt).
const std::string kPrefix = "libllama_moe-ggml-";
const std::string kCpuPrefix = kPrefix + "cpu-";

// ggml's entry points of a backend library (ggml-backend-impl.h).
using ScoreFunction = int (*)();
using InitFunction = ggml_backend_reg_t (*)();

std::string& chosen_cpu_variant() {
    static auto* variant = new std::string;
    return *variant;
}

bool starts_with(const std::string& text, const std::string& start) {
    return text.compare(0, start.size(), start) == 0;
}

fs::path own_folder() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) {
        return {};
    }
    return fs::path(info.dli_fname).parent_path() / "lib";
}

// 0 for a library that does not load or needs a better processor.
int score(const fs::path& library) {
    const std::unique_ptr<void, int (*)(void*)> handle(dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL), [](void* open) { return open ? dlclose(open) : 0; });
    auto function = handle ? reinterpret_cast<ScoreFunction>(dlsym(handle.get(), "ggml_backend_score")) : nullptr;
    return function ? function() : 0;
}

// Registers a backend that has at least so many devices; returns how many it has. Throws for a library that does not load.
std::size_t register_library(const std::string& library, std::size_t least_devices) {
    // Never closed: ggml cannot unload a backend whose threads may still run.
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        const char* message = dlerror();
        throw Error(message != nullptr ? message : library + " does not load");
    }
    auto init = reinterpret_cast<InitFunction>(dlsym(handle, "ggml_backend_init"));
    if (init == nullptr) {
        throw Error(library + " is no backend of ggml");
    }
    ggml_backend_reg_t backend = init();
    const std::size_t devices = backend ? ggml_backend_reg_dev_count(backend) : 0;
    if (backend != nullptr && devices >= least_devices) {
        ggml_backend_register(backend);
    }
    return devices;
}

}  // namespace

void load_own_backends() {
    std::error_code error;
    fs::path best;
    int best_score = 0;
    for (const auto& entry : fs::directory_iterator(own_folder(), error)) {
        if (starts_with(entry.path().filename().string(), kCpuPrefix)) {
            const int found = score(entry.path());
            if (found > best_score) {
                best_score = found;
                best = entry.path();
            }
        }
    }
    if (error) {
        return;  // no such folder: everything is linked in
    }
    if (best.empty()) {
        throw Error("no CPU backend in " + own_folder().string() + " runs on this processor; install llama_moe again, or build it here");
    }
    register_library(own_folder() / (kPrefix + "rpc.so"), 0);
    register_library(best, 1);
    const std::string name = best.stem().string();
    chosen_cpu_variant() = name.substr(kCpuPrefix.size());
}

std::string cpu_variant() {
    return chosen_cpu_variant();
}

bool load_plugin(const std::string& library) {
    return register_library(library, 1) > 0;
}

void* backend_function(const char* backend, const char* name) {
    ggml_backend_reg_t registry = ggml_backend_reg_by_name(backend);
    void* function = registry ? ggml_backend_reg_get_proc_address(registry, name) : nullptr;
    if (function == nullptr) {
        throw Error("this build has no " + std::string(backend) + " backend that offers " + name);
    }
    return function;
}

}  // namespace llama_moe
