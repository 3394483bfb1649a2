#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#include "backend_libraries.h"
#include "ggml-backend.h"
#include "llama.h"
#include "llama_moe/expert_backend.h"
#include "llama_moe/device.h"
#include "llama_moe/process.h"
#include "machine.h"

#ifndef LLAMA_MOE_VERSION
#define LLAMA_MOE_VERSION "0"
#endif
#ifndef LLAMA_MOE_LLAMA_CPP_COMMIT
#define LLAMA_MOE_LLAMA_CPP_COMMIT "unknown"
#endif
#ifdef GGML_BACKEND_DL
#define LLAMA_MOE_LINKAGE "dynamic"
#else
#define LLAMA_MOE_LINKAGE "static"
#endif

namespace llama_moe {
namespace {

// Distinct physical cores among the processors this process may run on; hyperthreads of one core count once.
int cores_in_affinity() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
        return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    }
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(static_cast<std::size_t>(cpu), &allowed)) {
            continue;
        }
        std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings");
        std::string siblings;
        cores.insert(std::getline(file, siblings) ? siblings : std::to_string(cpu));
    }
    return std::max(1, static_cast<int>(cores.size()));
}

// The CPU quota of this control group (cgroup v2's cpu.max, "quota period" in microseconds), rounded up; 0 for none.
int quota_cores() {
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    std::string quota;
    double period = 0;
    if (!(file >> quota >> period) || quota == "max" || period <= 0) {
        return 0;
    }
    return static_cast<int>(std::ceil(std::strtod(quota.c_str(), nullptr) / period));
}

std::string cpu_features() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (cpu == nullptr) {
        return "";
    }
    auto get_features = reinterpret_cast<ggml_backend_get_features_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_get_features"));
    std::string names;
    for (const ggml_backend_feature* feature = get_features ? get_features(ggml_backend_dev_backend_reg(cpu)) : nullptr;
         feature != nullptr && feature->name != nullptr; feature++) {
        names += (names.empty() ? "" : " ") + std::string(feature->name);
    }
    return names;
}

}  // namespace

std::uint64_t available_ram() {
    std::ifstream file("/proc/meminfo");
    std::string key;
    std::uint64_t kib = 0;
    std::string unit;
    while (file >> key >> kib >> unit) {
        if (key == "MemAvailable:") {
            return kib * 1024;
        }
    }
    return UINT64_MAX;
}

int usable_cores() {
    const int cores = cores_in_affinity();
    const int quota = quota_cores();
    return quota > 0 ? std::max(1, std::min(cores, quota)) : cores;
}

std::vector<std::pair<std::string, std::string>> build_info() {
    if (!forked()) {  // a child may read what was started before
        start_backend();
    }
    std::string backends;
    for (std::size_t i = 0; i < ggml_backend_reg_count(); i++) {
        backends += (i == 0 ? "" : " ") + std::string(ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }
    return {
        {"version", LLAMA_MOE_VERSION},
        {"llama_cpp_commit", LLAMA_MOE_LLAMA_CPP_COMMIT},
        {"llama_cpp_version", llama_version()},
#if defined(__clang__)
        {"compiler", "Clang " __clang_version__},
#else
        {"compiler", "GCC " __VERSION__},
#endif
        {"backends", backends},
        {"linkage", LLAMA_MOE_LINKAGE},
        {"cpu_variant", cpu_variant()},
        {"cpu_features", cpu_features()},
        {"expert_kernels", experts::kernel_name()},
    };
}

}  // namespace llama_moe
