#include "llama_moe/expert_backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "expert_store.h"
#include "ggml-backend-impl.h"
#include "kernels.h"
#include "mapped_file.h"
#include "multiplication.h"
#include "threads.h"

namespace llama_moe::experts {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr const char* kName = "Experts";

thread_local int scopes = 0;

// --- buffers ----------------------------------------------------------------------------------------------------

// Weights with kernels are packed as they are written; everything else in a buffer is as ggml has it: what llama.cpp puts next to the weights,
// such as those of adapters.
struct Buffer {
    explicit Buffer(std::size_t size) {
        memory.reset(static_cast<std::uint8_t*>(std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment)));
        if (!memory) {
            throw std::bad_alloc();
        }
    }

    std::unique_ptr<std::uint8_t, decltype(&std::free)> memory{nullptr, &std::free};
    std::mutex mutex;  // of the list
    std::vector<std::unique_ptr<ExpertWeights>> packed;
};

Buffer& buffer_of(ggml_backend_buffer_t buffer) {
    return *static_cast<Buffer*>(buffer->context);
}

ExpertWeights* packed_weights(const ggml_tensor* tensor) {
    return tensor->view_src == nullptr ? static_cast<ExpertWeights*>(tensor->extra) : nullptr;
}

const Format* packable(const ggml_tensor* tensor) {
    const Format* format = find_format(tensor->type);
    return format && tensor->view_src == nullptr && ggml_is_contiguous(tensor) && tensor->ne[3] == 1 && packs(*format, tensor->ne[0], tensor->ne[1])
               ? format
               : nullptr;
}

void free_buffer(ggml_backend_buffer_t buffer) {
    delete &buffer_of(buffer);
}

void* get_base(ggml_backend_buffer_t buffer) {
    return buffer_of(buffer).memory.get();
}

// What part of packed weights, written or read: whole groups of rows around some bytes.
struct Groups {
    Groups(const ExpertWeights& weights, std::size_t offset, std::size_t size)
        : first(offset / weights.group_bytes()),
          last((offset + size + weights.group_bytes() - 1) / weights.group_bytes()),
          whole(offset % weights.group_bytes() == 0 && size % weights.group_bytes() == 0) {}

    std::int64_t first_row() const { return static_cast<std::int64_t>(first) * kGroupRows; }
    std::int64_t rows() const { return static_cast<std::int64_t>(last - first) * kGroupRows; }

    std::size_t first, last;
    bool whole;
};

// The bytes of the groups as ggml has them.
std::vector<std::uint8_t> read_groups(const ExpertWeights& weights, const Groups& groups) {
    std::vector<std::uint8_t> bytes((groups.last - groups.first) * weights.group_bytes());
    weights.read_back(groups.first_row(), groups.rows(), bytes.data());
    return bytes;
}

ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
    if (const Format* format = packable(tensor)) {
        auto weights = std::make_unique<ExpertWeights>(*format, tensor->ne[0], tensor->ne[1], tensor->ne[2], static_cast<std::uint8_t*>(tensor->data));
        tensor->extra = weights.get();
        const std::lock_guard<std::mutex> lock(buffer_of(buffer).mutex);
        buffer_of(buffer).packed.push_back(std::move(weights));
    }
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor* tensor, const void* data, std::size_t offset, std::size_t size) {
    ExpertWeights* weights = packed_weights(tensor);
    if (!weights) {
        std::memcpy(static_cast<char*>(tensor->data) + offset, data, size);
        return;
    }
    const Groups groups(*weights, offset, size);
    if (groups.whole) {
        weights->place(groups.first_row(), groups.rows(), static_cast<const std::uint8_t*>(data));
        release_pages(data, size);
        return;
    }
    auto bytes = read_groups(*weights, groups);
    std::memcpy(bytes.data() + (offset - groups.first * weights->group_bytes()), data, size);
    weights->place(groups.first_row(), groups.rows(), bytes.data());
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor* tensor, void* data, std::size_t offset, std::size_t size) {
    const ExpertWeights* weights = packed_weights(tensor);
    if (!weights) {
        std::memcpy(data, static_cast<const char*>(tensor->data) + offset, size);
        return;
    }
    const Groups groups(*weights, offset, size);
    if (groups.whole) {
        weights->read_back(groups.first_row(), groups.rows(), static_cast<std::uint8_t*>(data));
        return;
    }
    const auto bytes = read_groups(*weights, groups);
    std::memcpy(data, bytes.data() + (offset - groups.first * weights->group_bytes()), size);
}

void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor, std::uint8_t value, std::size_t offset, std::size_t size) {
    const std::vector<std::uint8_t> bytes(size, value);
    set_tensor(buffer, tensor, bytes.data(), offset, size);
}

void clear(ggml_backend_buffer_t buffer, std::uint8_t value) {
    std::memset(get_base(buffer), value, buffer->size);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, std::size_t size) {
    ggml_backend_buffer_i functions{};
    functions.free_buffer = free_buffer;
    functions.get_base = get_base;
    functions.init_tensor = init_tensor;
    functions.memset_tensor = memset_tensor;
    functions.set_tensor = set_tensor;
    functions.get_tensor = get_tensor;
    functions.clear = clear;
    try {
        return ggml_backend_buffer_init(type, functions, new Buffer(size), size);
    } catch (const std::bad_alloc&) {
        return nullptr;  // llama.cpp says what it could not allocate
    }
}

// --- operations -------------------------------------------------------------------------------------------------

bool is_ours(const ggml_tensor* tensor) {
    return tensor && tensor->buffer && tensor->buffer->buft == expert_buffer_type();
}

// Rows of floats that the kernels can read where they are.
bool are_rows(const ggml_tensor* tensor) {
    return tensor->type == GGML_TYPE_F32 && tensor->nb[0] == sizeof(float);
}

bool multiplies(const ggml_tensor* op) {
    const ggml_tensor* weights = op->src[0];
    const ggml_tensor* activations = op->src[1];
    if (!is_ours(weights) || !are_rows(activations) || !are_rows(op)) {
        return false;
    }
    if (op->op == GGML_OP_MUL_MAT && (weights->ne[2] != 1 || weights->ne[3] != 1)) {
        return false;
    }
    if (op->op == GGML_OP_MUL_MAT_ID && (weights->ne[3] != 1 || op->src[2]->type != GGML_TYPE_I32)) {
        return false;
    }
    // A buffer of no size comes with the question whether weights should be here. Those that are here can always be used.
    if (weights->buffer->context == nullptr) {
        return packable(weights) && (op->op == GGML_OP_MUL_MAT_ID || ggml_is_quantized(weights->type));
    }
    return weights->type == GGML_TYPE_F32 || ggml_get_type_traits(weights->type)->to_float != nullptr;
}

class Backend {
   public:
    int threads = 1;

    void compute(ggml_cgraph* graph) {
        for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
            ggml_tensor* node = ggml_graph_node(graph, i);
            if (ggml_is_empty(node) || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
                continue;
            }
            switch (node->op) {
                case GGML_OP_MUL_MAT: multiply(node); break;
                case GGML_OP_MUL_MAT_ID: multiply_experts(node); break;
                case GGML_OP_NONE:
                case GGML_OP_RESHAPE:
                case GGML_OP_VIEW:
                case GGML_OP_PERMUTE:
                case GGML_OP_TRANSPOSE: break;
                default: GGML_ABORT("the expert backend has no %s", ggml_op_name(node->op));
            }
        }
    }

   private:
    static float* row_of(const ggml_tensor* tensor, std::int64_t i1, std::int64_t i2, std::int64_t i3) {
        return reinterpret_cast<float*>(static_cast<char*>(tensor->data) + static_cast<std::size_t>(i1) * tensor->nb[1] +
                                        static_cast<std::size_t>(i2) * tensor->nb[2] + static_cast<std::size_t>(i3) * tensor->nb[3]);
    }

    static float* row_of(const ggml_tensor* tensor, std::int64_t i) {
        return row_of(tensor, i % tensor->ne[1], i / tensor->ne[1] % tensor->ne[2], i / (tensor->ne[1] * tensor->ne[2]));
    }

    void multiply(ggml_tensor* node) {
        const std::int64_t rows = ggml_nrows(node->src[1]);
        assignments_.resize(1);
        assignments_[0].expert = 0;
        assignments_[0].rows.clear();
        assignments_[0].outputs.clear();
        for (std::int64_t i = 0; i < rows; i++) {
            assignments_[0].rows.push_back(static_cast<std::int32_t>(i));
            assignments_[0].outputs.push_back(row_of(node, i));
        }
        run(node);
    }

    void multiply_experts(ggml_tensor* node) {
        const ggml_tensor* ids = node->src[2];
        const std::int64_t experts = node->src[0]->ne[2];
        const std::int64_t rows_of_token = node->src[1]->ne[1];
        // One for every expert, without rows where nobody uses it; cleared vectors keep their memory.
        assignments_.resize(static_cast<std::size_t>(experts));
        for (std::int64_t e = 0; e < experts; e++) {
            auto& assignment = assignments_[static_cast<std::size_t>(e)];
            assignment.expert = e;
            assignment.rows.clear();
            assignment.outputs.clear();
        }
        for (std::int64_t token = 0; token < ids->ne[1]; token++) {
            for (std::int64_t used = 0; used < ids->ne[0]; used++) {
                const auto expert = *reinterpret_cast<const std::int32_t*>(static_cast<const char*>(ids->data) + static_cast<std::size_t>(token) * ids->nb[1] +
                                                                           static_cast<std::size_t>(used) * ids->nb[0]);
                GGML_ASSERT(expert >= 0 && expert < experts);
                auto& assignment = assignments_[static_cast<std::size_t>(expert)];
                assignment.rows.push_back(static_cast<std::int32_t>(token * rows_of_token + used % rows_of_token));
                assignment.outputs.push_back(row_of(node, used, token, 0));
            }
        }
        run(node);
    }

    void run(const ggml_tensor* node) {
        const ggml_tensor* activations = node->src[1];
        if (const ExpertWeights* weights = packed_weights(node->src[0])) {
            multiplication_.set_activations(weights->format(), weights->k(), ggml_nrows(activations), threads,
                                            [&](std::int64_t i) { return row_of(activations, i); });
            multiplication_.run(*weights, assignments_, threads);
        } else {
            run_plain(node->src[0], activations);
        }
    }

    // Weights that are as ggml has them: small ones, those of adapters.
    void run_plain(const ggml_tensor* weights, const ggml_tensor* activations) {
        const auto k = static_cast<std::size_t>(weights->ne[0]);
        const auto to_float = ggml_get_type_traits(weights->type)->to_float;
        in_parallel(threads, [&](int thread, int all) {
            std::vector<float> converted(k);
            for (const auto& assignment : assignments_) {
                for (std::int64_t row = thread; row < weights->ne[1] && !assignment.rows.empty(); row += all) {
                    const char* from = static_cast<const char*>(weights->data) + static_cast<std::size_t>(row) * weights->nb[1] +
                                       static_cast<std::size_t>(assignment.expert) * weights->nb[2];
                    if (weights->type == GGML_TYPE_F32) {
                        std::memcpy(converted.data(), from, k * sizeof(float));
                    } else {
                        to_float(from, converted.data(), static_cast<std::int64_t>(k));
                    }
                    for (std::size_t i = 0; i < assignment.rows.size(); i++) {
                        const float* values = row_of(activations, assignment.rows[i]);
                        float sum = 0;
                        for (std::size_t j = 0; j < k; j++) {
                            sum += converted[j] * values[j];
                        }
                        assignment.outputs[i][row] = sum;
                    }
                }
            }
        });
    }

    Multiplication multiplication_{usable_kernels().front()};
    std::vector<Assignment> assignments_;
};

// --- what ggml sees ---------------------------------------------------------------------------------------------

ggml_guid_t backend_guid() {
    static ggml_guid guid = {0x6c, 0x6c, 0x61, 0x6d, 0x61, 0x5f, 0x6d, 0x6f, 0x65, 0x2d, 0x65, 0x78, 0x70, 0x65, 0x72, 0x74};
    return &guid;
}

void set_threads(ggml_backend_t backend, int threads) {
    static_cast<Backend*>(backend->context)->threads = std::max(1, threads);
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char*) {
    ggml_backend_i functions{};
    functions.get_name = [](ggml_backend_t) { return kName; };
    functions.free = [](ggml_backend_t backend) {
        delete static_cast<Backend*>(backend->context);
        delete backend;
    };
    functions.graph_compute = [](ggml_backend_t backend, ggml_cgraph* graph) {
        static_cast<Backend*>(backend->context)->compute(graph);
        return GGML_STATUS_SUCCESS;
    };
    return new ggml_backend{backend_guid(), functions, device, new Backend()};
}

void get_properties(ggml_backend_dev_t device, ggml_backend_dev_props* properties) {
    *properties = {};
    properties->name = ggml_backend_dev_name(device);
    properties->description = ggml_backend_dev_description(device);
    properties->type = ggml_backend_dev_type(device);
    // llama.cpp lets several GPUs work on micro-batches side by side if all devices of a context can; this one would not be in their way.
    properties->caps.async = true;
    properties->caps.events = true;
}

ggml_backend_device* make_device() {
    ggml_backend_device_i functions{};
    functions.get_name = [](ggml_backend_dev_t) { return kName; };
    functions.get_description = [](ggml_backend_dev_t) { return "packed weights in host memory"; };
    functions.get_memory = [](ggml_backend_dev_t, std::size_t* free, std::size_t* total) { *free = *total = 0; };
    functions.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; };
    functions.get_props = get_properties;
    functions.init_backend = init_backend;
    // Results belong into ordinary memory, where ggml's CPU backend reads them without a copy. A load is asked to use the device for weights
    // by another answer; with this one it leaves the device out.
    functions.get_buffer_type = [](ggml_backend_dev_t) { return scopes > 0 ? expert_buffer_type() : ggml_backend_cpu_buffer_type(); };
    functions.supports_op = [](ggml_backend_dev_t, const ggml_tensor* op) {
        switch (op->op) {
            case GGML_OP_NONE:
            case GGML_OP_RESHAPE:
            case GGML_OP_VIEW:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE: return true;
            case GGML_OP_MUL_MAT:
            case GGML_OP_MUL_MAT_ID: return multiplies(op);
            default: return false;
        }
    };
    // Activations are read where they are.
    functions.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
        return type == expert_buffer_type() || ggml_backend_buft_is_host(type);
    };
    return new ggml_backend_device{functions, expert_registry(), nullptr};
}

}  // namespace

ggml_backend_reg_t expert_registry() {
    static auto* made = [] {
        ggml_backend_reg_i functions{};
        functions.get_name = [](ggml_backend_reg_t) { return kName; };
        functions.get_device_count = [](ggml_backend_reg_t) -> std::size_t { return 1; };
        functions.get_device = [](ggml_backend_reg_t, std::size_t) { return expert_device(); };
        functions.get_proc_address = [](ggml_backend_reg_t, const char* name) -> void* {
            return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? reinterpret_cast<void*>(set_threads) : nullptr;
        };
        return new ggml_backend_reg{GGML_BACKEND_API_VERSION, functions, nullptr};
    }();
    return made;
}

ggml_backend_dev_t expert_device() {
    static auto* device = make_device();
    return device;
}

ggml_backend_buffer_type_t expert_buffer_type() {
    static auto* type = [] {
        ggml_backend_buffer_type_i functions{};
        functions.get_name = [](ggml_backend_buffer_type_t) { return kName; };
        functions.alloc_buffer = alloc_buffer;
        functions.get_alignment = [](ggml_backend_buffer_type_t) { return kAlignment; };
        return new ggml_backend_buffer_type{functions, expert_device(), nullptr};
    }();
    return type;
}

std::string kernel_name() {
    return usable_kernels().front().name;
}

KernelsScope::KernelsScope() {
    scopes++;
}

KernelsScope::~KernelsScope() {
    scopes--;
}

}  // namespace llama_moe::experts
