#include "hypothetical_device.h"

#include <algorithm>

#include "ggml-backend-impl.h"  // to define a device
#include "ggml.h"

namespace llama_moe {
namespace {

// What ggml's CUDA backend aligns tensors to, pads the rows of quantised ones to, and from which batch on it takes over a product
// with weights that are in host memory (ggml-cuda.cu, common.cuh).
constexpr std::size_t kAlignment = 128;
constexpr std::int64_t kRowPadding = 512;
constexpr std::int64_t kOffloadBatch = 32;

const char* const kName = "hypothetical";

ggml_guid* guid() {
    static ggml_guid id = {0x6c, 0x6d, 0x6f, 0x65, 0x2d, 0x68, 0x79, 0x70, 0x6f, 0x74, 0x68, 0x65, 0x74, 0x69, 0x63, 0x00};
    return &id;
}

ggml_backend_reg_t registry() {
    static ggml_backend_reg reg = {
        GGML_BACKEND_API_VERSION,
        {
            [](ggml_backend_reg_t) { return kName; },
            [](ggml_backend_reg_t) -> std::size_t { return 0; },
            [](ggml_backend_reg_t, std::size_t) -> ggml_backend_dev_t { return nullptr; },
            [](ggml_backend_reg_t, const char*) -> void* { return nullptr; },
        },
        nullptr,
    };
    return &reg;
}

// --- buffers: a size, and an address that nothing reads -------------------------------------------------------------

ggml_backend_buffer_i buffer_interface() {
    ggml_backend_buffer_i interface {};
    interface.free_buffer = [](ggml_backend_buffer_t) {};
    interface.get_base = [](ggml_backend_buffer_t) -> void* { return reinterpret_cast<void*>(kAlignment); };  // NOLINT
    interface.memset_tensor = [](ggml_backend_buffer_t, ggml_tensor*, std::uint8_t, std::size_t, std::size_t) {};
    interface.set_tensor = [](ggml_backend_buffer_t, ggml_tensor*, const void*, std::size_t, std::size_t) {};
    interface.get_tensor = [](ggml_backend_buffer_t, const ggml_tensor*, void*, std::size_t, std::size_t) {
        GGML_ABORT("a hypothetical device holds no data");
    };
    interface.clear = [](ggml_backend_buffer_t, std::uint8_t) {};
    return interface;
}

// Attention over a cache in another format than f16 works on a copy in f16, for which room is left behind its result.
std::size_t attention_copies(const ggml_tensor* attention) {
    const auto* keys = attention->src[1];
    const auto* values = attention->src[2];
    const bool share = values->view_src != nullptr && (values->view_src == keys || values->view_src == keys->view_src) &&
                       values->view_offs == keys->view_offs;
    std::size_t size = 0;
    for (const auto* cache : {keys, values}) {
        if (cache->type != GGML_TYPE_F16 && !(cache == values && share)) {
            size = GGML_PAD(size, kAlignment) + static_cast<std::size_t>(ggml_nelements(cache)) * sizeof(ggml_fp16_t);
        }
    }
    return size;
}

std::size_t alloc_size(ggml_backend_buffer_type_t /*type*/, const ggml_tensor* tensor) {
    std::size_t size = ggml_nbytes(tensor);
    if (tensor->op == GGML_OP_FLASH_ATTN_EXT) {
        size = GGML_PAD(size, kAlignment) + attention_copies(tensor);
    }
    if (const std::int64_t rest = tensor->ne[0] % kRowPadding; ggml_is_quantized(tensor->type) && rest != 0) {
        size += ggml_row_size(tensor->type, kRowPadding - rest);
    }
    return size;
}

// --- the device -----------------------------------------------------------------------------------------------------

std::int64_t batch_size(const ggml_tensor* op) {
    switch (op->op) {
        case GGML_OP_GET_ROWS: return 0;
        case GGML_OP_MUL_MAT: return op->ne[1];
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE: return op->ne[2];
        default: return ggml_nrows(op);
    }
}

// Head sizes, sharing of heads and cache formats for which ggml's CUDA backend has a kernel (fattn.cu).
bool supports_attention(const ggml_tensor* op) {
    const auto* keys = op->src[1];
    const auto* values = op->src[2];
    const auto* mask = op->src[3];
    static const ggml_type formats[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q4_0,
                                        GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0};
    for (const auto* cache : {keys, values}) {
        if (std::find(std::begin(formats), std::end(formats), cache->type) == std::end(formats)) {
            return false;
        }
    }
    if (mask != nullptr && mask->ne[2] != 1) {
        return false;
    }
    const std::int64_t heads_per_cache_head = op->src[0]->ne[2] / keys->ne[2];
    switch (keys->ne[0]) {
        case 40:
        case 64:
        case 72:
        case 80:
        case 96:
        case 112:
        case 128:
        case 256:
        case 512: return values->ne[0] == keys->ne[0] && (keys->ne[0] < 512 || heads_per_cache_head >= 2);
        case 192: return values->ne[0] == 128 && heads_per_cache_head % 8 == 0;
        case 320: return values->ne[0] == 256 && heads_per_cache_head % 32 == 0;
        case 576: return values->ne[0] == 512 && heads_per_cache_head >= 2;
        default: return false;
    }
}

// Nearly everything, on tensors that are not in another device's memory.
bool supports_op(ggml_backend_dev_t device, const ggml_tensor* op) {
    if (op->op == GGML_OP_FLASH_ATTN_EXT && !supports_attention(op)) {
        return false;
    }
    return std::all_of(std::begin(op->src), std::end(op->src), [&](const ggml_tensor* source) {
        if (source == nullptr || source->buffer == nullptr) {
            return true;
        }
        auto* owner = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(source->buffer));
        return owner == nullptr || !is_hypothetical(owner) || owner == device;
    });
}

}  // namespace

struct HypotheticalDevice::State {
    std::string name;
    std::uint64_t memory;
    ggml_backend_buffer_type type{};
    ggml_backend_device device{};

    static State& of(ggml_backend_dev_t device) { return *static_cast<State*>(device->context); }
};

HypotheticalDevice::HypotheticalDevice(const std::string& name, std::uint64_t memory) : state_(std::make_unique<State>()) {
    state_->name = name;
    state_->memory = memory;

    auto& type = state_->type;
    type.device = &state_->device;
    type.context = state_.get();
    type.iface.get_name = [](ggml_backend_buffer_type_t t) { return static_cast<State*>(t->context)->name.c_str(); };
    type.iface.alloc_buffer = [](ggml_backend_buffer_type_t t, std::size_t size) {
        return ggml_backend_buffer_init(t, buffer_interface(), nullptr, size);
    };
    type.iface.get_alignment = [](ggml_backend_buffer_type_t) { return kAlignment; };
    type.iface.get_alloc_size = alloc_size;

    auto& device = state_->device;
    device.reg = registry();
    device.context = state_.get();
    device.iface.get_name = [](ggml_backend_dev_t d) { return State::of(d).name.c_str(); };
    device.iface.get_description = [](ggml_backend_dev_t) { return kName; };
    device.iface.get_memory = [](ggml_backend_dev_t d, std::size_t* free, std::size_t* total) { *free = *total = State::of(d).memory; };
    device.iface.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    device.iface.get_props = [](ggml_backend_dev_t d, ggml_backend_dev_props* props) {
        *props = {};
        props->name = State::of(d).name.c_str();
        props->description = kName;
        props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
        props->memory_free = props->memory_total = State::of(d).memory;
        props->caps.async = props->caps.events = props->caps.mmap_support = true;
    };
    device.iface.init_backend = [](ggml_backend_dev_t d, const char*) -> ggml_backend_t {
        ggml_backend_i interface {};
        interface.get_name = [](ggml_backend_t backend) { return ggml_backend_dev_name(backend->device); };
        interface.free = [](ggml_backend_t backend) { delete backend; };
        interface.graph_compute = [](ggml_backend_t, ggml_cgraph*) { return GGML_STATUS_FAILED; };
        return new ggml_backend{guid(), interface, d, nullptr};
    };
    device.iface.get_buffer_type = [](ggml_backend_dev_t d) { return &State::of(d).type; };
    device.iface.supports_op = supports_op;
    device.iface.supports_buft = [](ggml_backend_dev_t d, ggml_backend_buffer_type_t t) { return t == &State::of(d).type; };
    device.iface.offload_op = [](ggml_backend_dev_t, const ggml_tensor* op) { return batch_size(op) >= kOffloadBatch; };
}

HypotheticalDevice::~HypotheticalDevice() = default;

ggml_backend_dev_t HypotheticalDevice::get() const {
    return &state_->device;
}

bool is_hypothetical(ggml_backend_dev_t device) {
    return device != nullptr && device->reg == registry();
}

}  // namespace llama_moe
