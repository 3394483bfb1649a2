#include "buffers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "ggml-backend-impl.h"
#include "llama_moe/expert_backend.h"
#include "mapped_file.h"

namespace llama_moe::experts {
namespace {

constexpr std::size_t kAlignment = 64;

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

// Of a whole tensor of ours; null for one that is as ggml has it.
ExpertWeights* weights_of(const ggml_tensor* tensor) {
    return static_cast<ExpertWeights*>(tensor->extra);
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

// Piece by piece, so that not all of a large tensor is in memory twice.
void place(ExpertWeights& weights, const Groups& groups, const std::uint8_t* data) {
    constexpr std::size_t kPiece = 16 << 20;
    const std::size_t step = std::max<std::size_t>(1, kPiece / weights.group_bytes());
    for (std::size_t group = groups.first; group < groups.last; group += step) {
        const std::size_t count = std::min(step, groups.last - group);
        weights.place(static_cast<std::int64_t>(group) * kGroupRows, static_cast<std::int64_t>(count) * kGroupRows, data);
        release_pages(data, count * weights.group_bytes());
        data += count * weights.group_bytes();
    }
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

// Of a view, its bytes in the whole tensor.
template <class Tensor>
void find_whole(Tensor*& tensor, std::size_t& offset) {
    if (tensor->view_src) {
        offset += tensor->view_offs;
        tensor = tensor->view_src;
    }
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor* tensor, const void* data, std::size_t offset, std::size_t size) {
    find_whole(tensor, offset);
    ExpertWeights* weights = weights_of(tensor);
    if (!weights) {
        std::memcpy(static_cast<char*>(tensor->data) + offset, data, size);
        return;
    }
    const Groups groups(*weights, offset, size);
    if (groups.whole) {
        place(*weights, groups, static_cast<const std::uint8_t*>(data));
        return;
    }
    auto bytes = read_groups(*weights, groups);
    std::memcpy(bytes.data() + (offset - groups.first * weights->group_bytes()), data, size);
    weights->place(groups.first_row(), groups.rows(), bytes.data());
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor* tensor, void* data, std::size_t offset, std::size_t size) {
    find_whole(tensor, offset);
    const ExpertWeights* weights = weights_of(tensor);
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

}  // namespace

bool is_ours(const ggml_tensor* tensor) {
    return tensor && tensor->buffer && tensor->buffer->buft == expert_buffer_type();
}

const Format* packable(const ggml_tensor* tensor) {
    const Format* format = find_format(tensor->type);
    return format && tensor->view_src == nullptr && ggml_is_contiguous(tensor) && tensor->ne[3] == 1 && packs(*format, tensor->ne[0], tensor->ne[1])
               ? format
               : nullptr;
}

const ExpertWeights* packed_weights(const ggml_tensor* tensor) {
    return is_ours(tensor) && tensor->view_src == nullptr ? weights_of(tensor) : nullptr;
}

ggml_backend_buffer_type_t expert_buffer_type() {
    static auto* type = [] {
        ggml_backend_buffer_type_i functions{};
        functions.get_name = [](ggml_backend_buffer_type_t) { return "Experts"; };
        functions.alloc_buffer = alloc_buffer;
        functions.get_alignment = [](ggml_backend_buffer_type_t) { return kAlignment; };
        return new ggml_backend_buffer_type{functions, expert_device(), nullptr};
    }();
    return type;
}

}  // namespace llama_moe::experts
