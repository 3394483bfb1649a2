#include "llama_moe/bandwidth.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <thread>

#include "accelerators.h"
#include "backend.h"
#include "cpu_threads.h"
#include "expert_kernels.h"
#include "failed_devices.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/expert_backend.h"
#include "llama_moe/model.h"
#include "native_thread.h"
#include "worker_graphs.h"

namespace llama_moe {
namespace {

using Clock = std::chrono::steady_clock;

// What this process got of the machine.
struct Usage {
    double wall_seconds = 0;
    double cpu_seconds = 0;
    long preemptions = 0;  // a core was taken from a thread that was computing

    static Usage now() {
        rusage usage{};
        getrusage(RUSAGE_SELF, &usage);
        const auto seconds = [](const timeval& time) { return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec); };
        return {std::chrono::duration<double>(Clock::now().time_since_epoch()).count(), seconds(usage.ru_utime) + seconds(usage.ru_stime),
                usage.ru_nivcsw};
    }
    void add_since(const Usage& before) {
        const Usage after = now();
        wall_seconds += after.wall_seconds - before.wall_seconds;
        cpu_seconds += after.cpu_seconds - before.cpu_seconds;
        preemptions += after.preemptions - before.preemptions;
    }
};

struct Control {
    std::atomic<bool> stopped{false};
    Usage timed;  // of what was timed
};
using Stop = std::shared_ptr<Control>;

constexpr std::int64_t kWidth = 2048;         // of the vectors: the embedding of a model of a few billion parameters
constexpr std::int64_t kExperts = 32;         // of a tensor of experts
constexpr std::int64_t kExpertsUsed = 8;      // by one product
constexpr std::int64_t kMostColumns = 1 << 16;  // so that a matrix of the longest rows still has some
constexpr std::int64_t kExpertBytes = 1 << 20;
constexpr std::int64_t kMatrixBytes = 8 << 20;
constexpr int kRounds = 3;                    // at least
constexpr double kRoundsSeconds = 0.1;        // and until this time has passed
constexpr double kSpread = 1.25;              // of the fastest tenth of a measurement that nothing disturbed
constexpr double kMostPreemptions = 5.0;      // in a second, together with:
constexpr double kLeastShare = 0.9;           // of the time of the cores that it computes on
constexpr double kMostSeconds = 2.0;          // to wait for that
// Weights of this many times the last-level cache do not stay there from one pass to the next.
constexpr std::uint64_t kCacheFactor = 4;
constexpr std::uint64_t kLeastBytes = 128ull << 20;
constexpr std::uint64_t kMostBytes = 512ull << 20;
// Filled with it, no number format has zeros, denormals, infinities or NaNs.
constexpr std::uint8_t kFill = 0x11;

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::uint64_t beyond_the_caches() {
    long cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return std::clamp(kCacheFactor * static_cast<std::uint64_t>(std::max(cache, 0l)), kLeastBytes, kMostBytes);
}

void check_stop(const Stop& stop) {
    if (stop->stopped.load()) {
        throw CancelledError("the measurement was interrupted");
    }
}

// Seconds of one of `units` pieces of work that take equally long: the median of those that took less than twice as long as the fastest
// tenth. Others lost their core to another program on the way, which says something of the load and nothing of the machine; pieces of less
// than a millisecond find gaps between the time slices of other programs, and one with a barrier in it that lost a core waits for several
// milliseconds. Of the rest the median, not the best: a token takes hundreds of them. Where hardly any found a gap, more are tried.
double undisturbed_seconds(std::size_t units, const std::function<void(std::size_t)>& work, const Stop& stop) {
    for (std::size_t unit = 0; unit < units; unit++) {  // pages, thread teams and kernels are made by the first ones
        check_stop(stop);
        work(unit);
    }
    std::vector<double> seconds;
    const Usage before = Usage::now();
    const auto begin = Clock::now();
    for (int round = 1;; round++) {
        for (std::size_t unit = 0; unit < units; unit++) {
            check_stop(stop);
            const auto start = Clock::now();
            work(unit);
            seconds.push_back(seconds_since(start));
        }
        if (round < kRounds || seconds_since(begin) < kRoundsSeconds) {
            continue;
        }
        std::sort(seconds.begin(), seconds.end());
        const double tenth = seconds[seconds.size() / 10];
        if (tenth <= kSpread * seconds.front() || seconds_since(begin) > kMostSeconds) {
            stop->timed.add_since(before);
            const auto disturbed = std::upper_bound(seconds.begin(), seconds.end(), 2 * std::min(tenth, kSpread * seconds.front()));
            return seconds[static_cast<std::size_t>(disturbed - seconds.begin()) / 2];
        }
    }
}

ggml_context_ptr make_context(std::size_t tensors) {
    const ggml_init_params params{ggml_tensor_overhead() * tensors + ggml_graph_overhead_custom(tensors, false), nullptr, /*no_alloc=*/true};
    return ggml_context_ptr(ggml_init(params));
}

// The backends of a device and of the CPU, which are the same one for the CPU; there our expert backend stands before it.
struct Backends {
    CpuThreads threads;
    CpuThreads::Use use{threads};
    ggml_backend_ptr device;
    ggml_backend_ptr experts;

    Backends(ggml_backend_dev_t measured, int count) : threads(count) {
        if (measured != cpu_device()) {
            device = make_backend(measured, count);
        } else {
            experts = make_backend(experts::expert_device(), count);
        }
    }
    ggml_backend_t cpu() const { return threads.backend(); }
    ggml_backend_t get() const { return device ? device.get() : cpu(); }
};

// A graph that is computed as llama.cpp computes its own: by ggml's scheduler, over the device and the CPU, allocated once.
class Graph {
   public:
    Graph(const Backends& backends, std::size_t nodes)
        : backends_(backends), tensors_(nodes * 4 + 64), context_(make_context(tensors_)),
          graph_(ggml_new_graph_custom(context_.get(), tensors_, false)) {
        std::vector<ggml_backend_t> list;
        if (backends.device) {
            list.push_back(backends.device.get());
        }
        if (backends.experts) {
            list.push_back(backends.experts.get());
        }
        list.push_back(backends.cpu());
        scheduler_.reset(ggml_backend_sched_new(list.data(), nullptr, static_cast<int>(list.size()), tensors_, false, true));
    }

    ggml_context* context() const { return context_.get(); }

    // `on_device`: else on the CPU. Weights already say where their product is computed.
    void add(ggml_tensor* node, std::optional<bool> on_device = std::nullopt) {
        if (on_device) {
            ggml_backend_sched_set_tensor_backend(scheduler_.get(), node, *on_device ? backends_.get() : backends_.cpu());
        }
        ggml_build_forward_expand(graph_, node);
    }

    ggml_tensor* input(ggml_type type, std::initializer_list<std::int64_t> shape) {
        ggml_tensor* tensor = ggml_new_tensor(context(), type, static_cast<int>(shape.size()), shape.begin());
        ggml_set_input(tensor);
        inputs_.push_back(tensor);
        return tensor;
    }

    void allocate() {
        if (!ggml_backend_sched_alloc_graph(scheduler_.get(), graph_)) {
            throw DoesNotFitError("no memory for the graph of a measurement");
        }
        for (ggml_tensor* tensor : inputs_) {
            if (tensor->buffer != nullptr && tensor->type == GGML_TYPE_F32) {
                set<float>(tensor, 1.0f);
            } else if (tensor->buffer != nullptr) {
                ggml_backend_tensor_memset(tensor, 0, 0, ggml_nbytes(tensor));
            }
        }
    }

    template <typename T>
    void set(ggml_tensor* tensor, T value) {
        const std::vector<T> values(ggml_nbytes(tensor) / sizeof(T), value);
        ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
    }

    void compute() {
        if (ggml_backend_sched_graph_compute(scheduler_.get(), graph_) != GGML_STATUS_SUCCESS) {
            throw DecodeError("a graph of the measurement could not be computed");
        }
    }

   private:
    const Backends& backends_;
    std::size_t tensors_;
    ggml_context_ptr context_;
    ggml_cgraph* graph_;
    ggml_backend_sched_ptr scheduler_;
    std::vector<ggml_tensor*> inputs_;
};

// ggml must not be asked to free what an abort was thrown through: then the objects are left as they are.
template <typename Made, typename Use>
auto with(std::unique_ptr<Made> made, Use use) {
    try {
        return use(*made);
    } catch (const NativeAbort&) {
        static_cast<void>(made.release());
        throw;
    }
}

// ---- weights

// Where llama.cpp would put weights of the host, in the order of its make_cpu_buft_list (llama-model.cpp), or of the device.
std::vector<std::pair<ggml_backend_dev_t, ggml_backend_buffer_type_t>> weight_buffer_types(ggml_backend_dev_t device, const std::string& layout) {
    if (device != cpu_device()) {
        return {{device, ggml_backend_dev_buffer_type(device)}};
    }
    std::vector<std::pair<ggml_backend_dev_t, ggml_backend_buffer_type_t>> result;
    if (layout == "packed") {
        result.emplace_back(experts::expert_device(), experts::expert_buffer_type());
    }
    if (layout != "plain") {
        auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
            ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
        for (ggml_backend_buffer_type_t* type = extra ? extra(device) : nullptr; type != nullptr && *type != nullptr; type++) {
            result.emplace_back(device, *type);
        }
    }
    result.emplace_back(device, ggml_backend_dev_buffer_type(device));
    return result;
}

struct Product {
    ggml_type type;
    std::int64_t columns;
    bool experts;

    std::int64_t rows() const {
        const std::int64_t fit = (experts ? kExpertBytes : kMatrixBytes) / static_cast<std::int64_t>(ggml_row_size(type, columns));
        return fit >= 64 ? fit / 64 * 64 : std::max<std::int64_t>(8, fit / 8 * 8);  // repacked layouts take rows by the 4, 8 or 16
    }
    ggml_tensor* weights(ggml_context* context) const {
        return experts ? ggml_new_tensor_3d(context, type, columns, rows(), kExperts) : ggml_new_tensor_2d(context, type, columns, rows());
    }
    ggml_tensor* apply(ggml_context* context, ggml_tensor* weights, ggml_tensor* vector, ggml_tensor* ids) const {
        return experts ? ggml_mul_mat_id(context, weights, vector, ids) : ggml_mul_mat(context, weights, vector);
    }
};

// Asked as llama.cpp asks when it loads: with an empty buffer of the type.
bool is_supported(const Product& product, ggml_backend_dev_t device, ggml_backend_buffer_type_t buffer_type) {
    const ggml_context_ptr context = make_context(8);
    ggml_tensor* weights = product.weights(context.get());
    const ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(buffer_type, 0));
    weights->buffer = buffer.get();
    ggml_tensor* vector = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, product.columns, 1, 1);
    ggml_tensor* ids = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, kExpertsUsed, 1);
    return ggml_backend_dev_supports_op(device, product.apply(context.get(), weights, vector, ids));
}

// One buffer of each type, used for one product after another: getting the pages takes longer than reading them many times.
class WeightMemory {
   public:
    ggml_backend_buffer_t get(ggml_backend_buffer_type_t type) {
        auto& buffer = buffers_[type];
        if (!buffer) {
            const std::size_t bytes = beyond_the_caches() + (1 << 20);
            buffer.reset(ggml_backend_buft_alloc_buffer(type, bytes));
            if (!buffer) {
                throw DoesNotFitError("measuring needs " + std::to_string(bytes >> 20) + " MiB of " + ggml_backend_buft_name(type) +
                                      " memory, which are not free");
            }
            ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            ggml_backend_buffer_clear(buffer.get(), kFill);
        }
        return buffer.get();
    }

   private:
    std::map<ggml_backend_buffer_type_t, ggml_backend_buffer_ptr> buffers_;
};

struct Weights {
    ggml_context_ptr context = make_context(1024);
    std::vector<ggml_tensor*> tensors;
    std::uint64_t bytes = 0;

    // As many tensors as there is room for, which together are well beyond the caches.
    Weights(const Product& product, ggml_backend_buffer_t buffer) {
        ggml_tallocr allocator = ggml_tallocr_new(buffer);
        const std::size_t size = ggml_backend_buffer_get_alloc_size(buffer, product.weights(context.get()));
        const std::size_t padded = GGML_PAD(size, ggml_backend_buffer_get_alignment(buffer));
        for (std::size_t end = padded; end < ggml_backend_buffer_get_size(buffer); end += padded) {
            tensors.push_back(product.weights(context.get()));
            ggml_tallocr_alloc(&allocator, tensors.back());
            bytes += ggml_nbytes(tensors.back());
        }
    }
};

// One pass over the weights, in graphs of a few products each.
struct ProductRun {
    Weights weights;
    std::vector<std::unique_ptr<Graph>> graphs;

    // `products`: how many a graph has.
    ProductRun(const Product& product, const Backends& backends, ggml_backend_buffer_t buffer, std::size_t products)
        : weights(product, buffer) {
        // Each expert is used once in a pass, so that a pass reads all weights, a quarter of a tensor with each product.
        const std::size_t groups = product.experts ? kExperts / kExpertsUsed : 1;
        const std::size_t all = weights.tensors.size() * groups;
        for (std::size_t begin = 0; begin + products <= all; begin += products) {
            graphs.push_back(std::make_unique<Graph>(backends, products));
            add_products(product, *graphs.back(), begin, products);
        }
        weights.bytes = weights.bytes / all * products * graphs.size();  // a rest that fills no graph is left out
    }

   private:
    void add_products(const Product& product, Graph& graph, std::size_t begin, std::size_t count) {
        ggml_tensor* vector = graph.input(GGML_TYPE_F32, {product.columns, 1, 1});
        std::vector<ggml_tensor*> ids(product.experts ? kExperts / kExpertsUsed : 0);
        for (std::size_t i = begin; i < begin + count; i++) {
            ggml_tensor* chosen = nullptr;
            if (product.experts) {
                ggml_tensor*& group = ids[i / weights.tensors.size()];
                group = group != nullptr ? group : graph.input(GGML_TYPE_I32, {kExpertsUsed, 1});
                chosen = group;
            }
            graph.add(product.apply(graph.context(), weights.tensors[i % weights.tensors.size()], vector, chosen));
        }
        graph.allocate();
        for (std::size_t group = 0; group < ids.size(); group++) {
            if (ids[group] != nullptr) {
                std::vector<std::int32_t> experts;
                for (std::int64_t i = 0; i < kExpertsUsed; i++) {
                    // 13 and 32 have no common divisor: all experts, none next to the one before it.
                    experts.push_back(static_cast<std::int32_t>((static_cast<std::int64_t>(group) * kExpertsUsed + i) * 13 % kExperts));
                }
                ggml_backend_tensor_set(ids[group], experts.data(), 0, experts.size() * sizeof(experts[0]));
            }
        }
    }
};

// What all measurements of a device need, which is made once.
struct Rig {
    ggml_backend_dev_t device;
    Backends backends;
    WeightMemory memory;
    Rig(ggml_backend_dev_t device, int threads) : device(device), backends(device, threads) {}
    bool is_cpu() const { return device == cpu_device(); }
};

double product_rate(const Product& product, Rig& rig, const std::string& layout, const Stop& stop) {
    for (const auto& [owner, type] : weight_buffer_types(rig.device, layout)) {
        if (is_supported(product, owner, type)) {
            ggml_backend_buffer_t buffer = rig.memory.get(type);
            // An accelerator is given much at once, because starting it takes long.
            const std::size_t products = rig.is_cpu() ? 1 : ggml_backend_buffer_get_size(buffer) / kMatrixBytes / 2;
            return with(std::make_unique<ProductRun>(product, rig.backends, buffer, products), [&](ProductRun& run) {
                const double seconds = undisturbed_seconds(run.graphs.size(), [&](std::size_t unit) { run.graphs[unit]->compute(); }, stop);
                return static_cast<double>(run.weights.bytes / run.graphs.size()) / seconds;
            });
        }
    }
    return 0;
}

// The CPU backend says that it can multiply any type. Those of which a file cannot have weights have no way to numbers.
bool is_of_weights(ggml_type type) {
    return ggml_blck_size(type) > 0 && (type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr);
}

Product parse(const ProductKind& kind) {
    std::string known;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const auto type = static_cast<ggml_type>(i);
        std::string name = is_of_weights(type) ? ggml_type_name(type) : "";
        std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
        if (name.empty() || name != kind.type) {
            known += name.empty() ? "" : (known.empty() ? "" : ", ") + name;
            continue;
        }
        const std::int64_t block = ggml_blck_size(type);
        if (kind.columns < block || kind.columns % block != 0 || kind.columns > kMostColumns) {
            throw InvalidOptionError("a row of " + std::to_string(kind.columns) + " numbers in " + name + "; it must be a multiple of " +
                                     std::to_string(block) + ", at most " + std::to_string(kMostColumns));
        }
        return {type, kind.columns, kind.experts};
    }
    throw InvalidOptionError("no number format of weights '" + kind.type + "'; there are: " + known);
}

// ---- the rest of a device

// Operations of the kinds that a layer has between its products, on one token's vector. Few of them on the CPU, whose threads meet after
// each: another program delays a longer graph nearly always. Many on an accelerator, which takes longer to start.
double operation_seconds(const Backends& backends, const Stop& stop) {
    const int repeats = backends.device ? 64 : 6;
    constexpr int kOperations = 6;
    constexpr std::int64_t kHeads = 16;
    return with(std::make_unique<Graph>(backends, static_cast<std::size_t>(repeats * kOperations)), [&](Graph& graph) {
        ggml_context* context = graph.context();
        ggml_tensor* vector = graph.input(GGML_TYPE_F32, {kWidth});
        ggml_tensor* scale = graph.input(GGML_TYPE_F32, {kWidth});
        ggml_tensor* position = graph.input(GGML_TYPE_I32, {1});
        ggml_tensor* x = vector;
        const auto add = [&](ggml_tensor* node) {
            graph.add(node, true);
            x = node;
        };
        for (int i = 0; i < repeats; i++) {
            add(ggml_rms_norm(context, x, 1e-6f));
            add(ggml_mul(context, x, scale));
            add(ggml_rope(context, ggml_reshape_3d(context, x, kWidth / kHeads, kHeads, 1), position, static_cast<int>(kWidth / kHeads),
                          GGML_ROPE_TYPE_NEOX));
            x = ggml_reshape_1d(context, x, kWidth);
            add(ggml_swiglu_split(context, x, scale));
            add(ggml_soft_max(context, x));
            add(ggml_add(context, x, vector));
        }
        graph.allocate();
        return undisturbed_seconds(1, [&](std::size_t) { graph.compute(); }, stop) / (repeats * kOperations);
    });
}

double graph_seconds(const Backends& backends, const Stop& stop) {
    return with(std::make_unique<Graph>(backends, 1), [&](Graph& graph) {
        ggml_tensor* vector = graph.input(GGML_TYPE_F32, {kWidth});
        graph.add(ggml_add(graph.context(), vector, vector), true);
        graph.allocate();
        return undisturbed_seconds(1, [&](std::size_t) { graph.compute(); }, stop);
    });
}

// A vector goes to and fro, as it does between a layer on the device and its experts on the CPU.
double crossing_seconds(const Backends& backends, const Stop& stop) {
    constexpr int kCrossings = 32;
    return with(std::make_unique<Graph>(backends, kCrossings), [&](Graph& graph) {
        ggml_tensor* x = graph.input(GGML_TYPE_F32, {kWidth});
        for (int i = 0; i < kCrossings; i++) {
            x = ggml_scale(graph.context(), x, 1.0f);
            graph.add(x, i % 2 == 0);
        }
        graph.allocate();
        return undisturbed_seconds(1, [&](std::size_t) { graph.compute(); }, stop) / kCrossings;
    });
}

// Seconds of attention over `length` tokens in each of several caches, and the bytes it reads, once for each query head.
std::pair<double, double> attention_seconds(ggml_backend_dev_t device, const Backends& backends, std::int64_t length, const Stop& stop) {
    constexpr std::int64_t kHeadSize = 128;
    constexpr std::int64_t kHeads = 16;
    constexpr std::int64_t kKvHeads = 4;
    constexpr int kCaches = 2;
    struct Run {
        ggml_context_ptr context = make_context(kCaches * 2);
        std::vector<ggml_tensor*> caches;
        ggml_backend_buffer_ptr buffer;
        Graph graph;
        explicit Run(const Backends& backends) : graph(backends, kCaches) {}
    };
    return with(std::make_unique<Run>(backends), [&](Run& run) -> std::pair<double, double> {
        ggml_context* context = run.graph.context();
        for (int i = 0; i < kCaches * 2; i++) {
            run.caches.push_back(ggml_new_tensor_3d(run.context.get(), GGML_TYPE_F16, kHeadSize, length, kKvHeads));
        }
        run.buffer.reset(
            ggml_backend_alloc_ctx_tensors_from_buft(run.context.get(), ggml_backend_dev_buffer_type(device)));
        if (!run.buffer) {
            throw DoesNotFitError("no memory for measuring attention on '" + device_name(device) + "'");
        }
        ggml_backend_buffer_clear(run.buffer.get(), kFill);
        ggml_tensor* query = run.graph.input(GGML_TYPE_F32, {kHeadSize, 1, kHeads});
        ggml_tensor* mask = run.graph.input(GGML_TYPE_F16, {length, 64});
        for (std::size_t i = 0; i < kCaches; i++) {
            ggml_tensor* node = ggml_flash_attn_ext(context, query, run.caches[2 * i], run.caches[2 * i + 1], mask, 0.1f, 0.0f, 0.0f);
            if (!ggml_backend_dev_supports_op(device, node)) {
                return {0.0, 0.0};
            }
            run.graph.add(node, true);
        }
        run.graph.allocate();
        return {undisturbed_seconds(1, [&](std::size_t) { run.graph.compute(); }, stop), static_cast<double>(kCaches * kHeads * length * kHeadSize * 2 * 2)};
    });
}

double attention_rate(ggml_backend_dev_t device, const Backends& backends, const Stop& stop) {
    const auto [short_seconds, short_bytes] = attention_seconds(device, backends, 256, stop);
    const auto [long_seconds, long_bytes] = attention_seconds(device, backends, 2048, stop);
    // The difference: what an operation costs whatever its size is counted elsewhere.
    return long_seconds > short_seconds ? (long_bytes - short_bytes) / (long_seconds - short_seconds) : 0;
}

double copy_rate(ggml_backend_dev_t device, const Stop& stop) {
    constexpr std::int64_t kBytes = 32 << 20;
    const std::vector<std::uint8_t> source(kBytes, kFill);
    struct Target {
        ggml_context_ptr context = make_context(1);
        ggml_backend_buffer_ptr buffer;
    };
    return with(std::make_unique<Target>(), [&](Target& target) {
        ggml_tensor* tensor = ggml_new_tensor_1d(target.context.get(), GGML_TYPE_I8, kBytes);
        target.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(target.context.get(), ggml_backend_dev_buffer_type(device)));
        if (!target.buffer) {
            throw DoesNotFitError("no memory for measuring copies to '" + device_name(device) + "'");
        }
        std::uint8_t last = 0;
        const auto copy = [&](std::size_t) {
            ggml_backend_tensor_set(tensor, source.data(), 0, kBytes);
            ggml_backend_tensor_get(tensor, &last, kBytes - 1, 1);  // it is there when its last byte comes back
        };
        return static_cast<double>(kBytes) / undisturbed_seconds(1, copy, stop);
    });
}

// All threads add up the words of one block of memory after the other, each its part.
double memory_rate(int threads, const Stop& stop) {
    constexpr std::size_t kBlockWords = (32 << 20) / sizeof(std::uint64_t);
    const std::size_t blocks = 2 * beyond_the_caches() / sizeof(std::uint64_t) / kBlockWords;
    const std::vector<std::uint64_t> words(blocks * kBlockWords, 1);
    const std::size_t part = kBlockWords / static_cast<std::size_t>(threads);
    std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads) * 8);  // a cache line for each
    const auto read_part = [&](std::size_t block, std::size_t thread) {
        const std::uint64_t* begin = words.data() + block * kBlockWords + thread * part;
        sums[thread * 8] = std::accumulate(begin, begin + part, sums[thread * 8]);
    };
    const auto read = [&](std::size_t block) {
        std::vector<std::thread> others;
        for (std::size_t thread = 1; thread < static_cast<std::size_t>(threads); thread++) {
            others.emplace_back(read_part, block, thread);
        }
        read_part(block, 0);
        for (auto& other : others) {
            other.join();
        }
    };
    const double seconds = undisturbed_seconds(blocks, read, stop);
    if (sums[0] == 0) {  // never: it keeps the sums from being optimised away
        throw Error("memory could not be read");
    }
    return static_cast<double>(part * static_cast<std::size_t>(threads) * sizeof(std::uint64_t)) / seconds;
}

RateOptions complete(RateOptions options) {
    options.validate();
    options.threads = options.threads > 0 ? options.threads : usable_cores();
    return options;
}

ggml_backend_dev_t measured_device(const std::string& name) {
    ggml_backend_dev_t device = find_device(name);
    if (device == nullptr) {
        throw InvalidOptionError("no device '" + name + "'; there are: " + known_devices());
    }
    if (any_failed({device})) {
        throw InvalidOptionError("device '" + name + "' failed earlier; it cannot be used again in this process");
    }
    return device;
}

// The threads spin while they wait for each other, so that nothing but another program keeps them from using their cores. Of what an
// accelerator does, this machine's use tells nothing.
bool was_disturbed(const Usage& usage, ggml_backend_dev_t device, int threads) {
    const double cores = std::min(threads, usable_cores());
    return device == cpu_device() && usage.cpu_seconds < kLeastShare * cores * usage.wall_seconds &&
           static_cast<double>(usage.preemptions) > kMostPreemptions * usage.wall_seconds;
}

// Runs `measure(stop)` on a thread of its own and returns what it does, and whether it was disturbed.
template <typename Measure>
auto measured(ggml_backend_dev_t device, int threads, const Poll& poll, Measure measure) {
    auto result = std::make_shared<decltype(measure(Stop{}))>();
    auto stop = std::make_shared<Control>();
    run_native(
        [=] {
            const WorkerUse use({device}, WorkerUse::Kind::both);
            try {
                *result = measure(stop);
                result->disturbed = was_disturbed(stop->timed, device, threads);
            } catch (const NativeAbort& abort) {
                throw DecodeError(std::string("a measurement failed: ") + abort.what());
            }
        },
        poll, [stop] { stop->stopped.store(true); }, {device});
    return std::move(*result);
}

}  // namespace

void RateOptions::validate() const {
    if (threads < 0 || threads > 512) {  // GGML_MAX_N_THREADS
        throw InvalidOptionError("threads is " + std::to_string(threads) + "; it must be 0 (one per core) to 512");
    }
    if (layout != "packed" && layout != "repacked" && layout != "plain") {
        throw InvalidOptionError("layout is '" + layout + "'; it must be one of packed, repacked, plain");
    }
}

ProductRates measure_products(const RateOptions& options, const std::vector<ProductKind>& kinds, const Poll& poll) {
    start_backend();
    const RateOptions completed = complete(options);
    ggml_backend_dev_t device = measured_device(options.device);
    std::vector<Product> products;
    std::transform(kinds.begin(), kinds.end(), std::back_inserter(products), parse);
    return measured(device, completed.threads, poll, [=](const Stop& stop) {
        return with(std::make_unique<Rig>(device, completed.threads), [&](Rig& rig) {
            ProductRates rates;
            for (const auto& product : products) {
                check_stop(stop);
                rates.bytes_per_second.push_back(product_rate(product, rig, completed.layout, stop));
            }
            return rates;
        });
    });
}

DeviceRates measure_device(const RateOptions& options, const Poll& poll) {
    start_backend();
    const int threads = complete(options).threads;
    ggml_backend_dev_t device = measured_device(options.device);
    return measured(device, threads, poll, [=](const Stop& stop) {
        return with(std::make_unique<Backends>(device, threads), [&](const Backends& backends) {
            DeviceRates rates;
            if (device == cpu_device()) {
                rates.memory_bytes_per_second = memory_rate(threads, stop);
            } else {
                rates.copy_bytes_per_second = copy_rate(device, stop);
                rates.crossing_seconds = crossing_seconds(backends, stop);
            }
            rates.operation_seconds = operation_seconds(backends, stop);
            rates.graph_seconds = graph_seconds(backends, stop);
            rates.attention_bytes_per_second = attention_rate(device, backends, stop);
            return rates;
        });
    });
}

std::string weight_layout(const ModelOptions& options) {
    start_backend();
    const Accelerators accelerators(options);
    if (choose_kernels(options, {}, accelerators).packed) {
        return "packed";
    }
    return options.repack && !accelerators.offer_pinned_memory() ? "repacked" : "plain";
}

}  // namespace llama_moe
