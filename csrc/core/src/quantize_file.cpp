#include "quantize_file.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "ggml.h"
#include "gguf.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "native_thread.h"

namespace llama_moe {
namespace {

// Elements converted at once by a thread: few enough to stop within a moment also for the slowest types, and to fit a core's cache.
constexpr std::int64_t kChunkElements = 64 * 1024;

[[noreturn]] void throw_file_error(const std::string& action, const std::string& path) {
    const int code = errno;
    throw FileError(code, "cannot " + action + " '" + path + "': " + std::strerror(code));
}

class InputFile {
   public:
    explicit InputFile(const std::string& path) : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (descriptor_ < 0) {
            throw_file_error("read", path);
        }
    }
    ~InputFile() { ::close(descriptor_); }
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    void read(void* data, std::size_t size, std::uint64_t offset) const {
        auto* at = static_cast<char*>(data);
        while (size > 0) {
            const ssize_t got = ::pread(descriptor_, at, size, static_cast<off_t>(offset));
            if (got < 0 && errno == EINTR) {
                continue;
            }
            if (got < 0) {
                throw_file_error("read", path_);
            }
            if (got == 0) {
                throw ModelLoadError("'" + path_ + "' ended while it was read");
            }
            at += got;
            size -= static_cast<std::size_t>(got);
            offset += static_cast<std::uint64_t>(got);
        }
    }

   private:
    std::string path_;
    int descriptor_;
};

bool all_finite(const float* values, std::int64_t count) {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

// Mean squares of the inputs of each column, for each expert.
using ImatrixWeights = std::shared_ptr<const std::vector<float>>;

ImatrixWeights imatrix_weights(const QuantizedTensor& tensor, const Imatrix* imatrix) {
    if (imatrix == nullptr || tensor.type_id == tensor.source.type_id) {
        return nullptr;
    }
    auto weights = std::make_shared<std::vector<float>>(imatrix->weights(tensor.source.name));
    const auto& shape = tensor.source.shape;
    const std::int64_t expected = shape[0] * (shape.size() > 2 ? shape[2] : 1);
    const bool fits = static_cast<std::int64_t>(weights->size()) == expected;
    if (!fits && !weights->empty() && tensor.source.role != TensorRole::embedding) {
        throw InvalidOptionError("the importance matrix '" + imatrix->path + "' is of another model: it has " + std::to_string(weights->size()) +
                                 " values for '" + tensor.source.name + "', which needs " + std::to_string(expected));
    }
    return fits ? weights : nullptr;
}

void check_imatrix(const QuantizePlan& plan, const Imatrix* imatrix) {
    for (const auto& tensor : plan.tensors) {
        if (imatrix_weights(tensor, imatrix) != nullptr || !tensor.needs_imatrix) {
            continue;
        }
        throw InvalidOptionError(tensor.type + " for '" + tensor.source.name + "' needs an importance matrix" +
                                 (imatrix == nullptr ? "; see imatrix() and llama-moe imatrix" : "; '" + imatrix->path + "' has no values for it"));
    }
}

// The rows of one tensor that a thread converts at once. A chunk lies within one expert.
struct Chunk {
    const QuantizedTensor* tensor = nullptr;
    std::uint64_t target = 0;  // where the tensor begins in the new file
    ImatrixWeights imatrix;
    std::int64_t row = 0;
    std::int64_t rows = 0;
};

// Hands out the chunks of all tensors in the order of the new file.
class ChunkQueue {
   public:
    ChunkQueue(const QuantizePlan& plan, const Imatrix* imatrix) : plan_(plan), imatrix_(imatrix), target_(plan.header.size()) { begin_tensor(); }

    bool take(Chunk& chunk) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (index_ == plan_.tensors.size()) {
            return false;
        }
        const QuantizedTensor& tensor = plan_.tensors[index_];
        const auto& shape = tensor.source.shape;
        const std::int64_t matrix_rows = shape.size() > 1 ? shape[1] : 1;
        const std::int64_t most = std::max<std::int64_t>(1, kChunkElements / shape[0]);
        const std::int64_t rows = std::min(most, matrix_rows - row_ % matrix_rows);
        chunk = {&tensor, target_, weights_, row_, rows};
        row_ += rows;
        if (row_ == ggml_rows(shape)) {
            target_ += GGML_PAD(tensor.bytes, GGUF_DEFAULT_ALIGNMENT);
            index_++;
            begin_tensor();
        }
        return true;
    }

   private:
    static std::int64_t ggml_rows(const std::vector<std::int64_t>& shape) {
        std::int64_t rows = 1;
        for (std::size_t i = 1; i < shape.size(); i++) {
            rows *= shape[i];
        }
        return rows;
    }

    void begin_tensor() {
        row_ = 0;
        weights_ = index_ < plan_.tensors.size() ? imatrix_weights(plan_.tensors[index_], imatrix_) : nullptr;
    }

    const QuantizePlan& plan_;
    const Imatrix* imatrix_;
    std::mutex mutex_;
    std::size_t index_ = 0;
    std::uint64_t target_;
    ImatrixWeights weights_;
    std::int64_t row_ = 0;
};

// One thread's buffers, and the conversion of a chunk.
class Converter {
   public:
    Converter(const std::vector<std::unique_ptr<InputFile>>& sources, OutputFile& file) : sources_(sources), file_(file) {}

    // Returns the bytes read.
    std::uint64_t convert(const Chunk& chunk) {
        const TensorInfo& source = chunk.tensor->source;
        const auto from = static_cast<ggml_type>(source.type_id);
        const auto to = static_cast<ggml_type>(chunk.tensor->type_id);
        const std::int64_t columns = source.shape.front();
        const std::int64_t count = chunk.rows * columns;
        const std::size_t row_size = ggml_row_size(from, columns);
        read_.resize(row_size * static_cast<std::size_t>(chunk.rows));
        sources_[source.file]->read(read_.data(), read_.size(), source.offset + row_size * static_cast<std::uint64_t>(chunk.row));

        const float* values = to_floats(from, read_, read_floats_, count);
        if (values != nullptr && !all_finite(values, count)) {
            throw QuantizeError("the tensor '" + source.name + "' has values that are not finite numbers");
        }
        if (from == to) {
            file_.write(read_.data(), read_.size(), chunk.target + row_size * static_cast<std::uint64_t>(chunk.row));
            return read_.size();
        }
        if (values == nullptr) {
            throw QuantizeError("the tensor '" + source.name + "' is " + source.type + ", which cannot be converted");
        }
        const std::size_t new_row_size = ggml_row_size(to, columns);
        written_.resize(new_row_size * static_cast<std::size_t>(chunk.rows));
        const std::int64_t matrix_rows = source.shape.size() > 1 ? source.shape[1] : 1;
        const float* weights = chunk.imatrix ? chunk.imatrix->data() + chunk.row / matrix_rows * columns : nullptr;
        ggml_quantize_chunk(to, values, written_.data(), 0, chunk.rows, columns, weights);
        // A scale can overflow where the values do not. (ggml_validate_row_data would find the same, and print to stderr.)
        if (!all_finite(to_floats(to, written_, written_floats_, count), count)) {
            throw QuantizeError("the tensor '" + source.name + "' has values that are too large for " + chunk.tensor->type);
        }
        file_.write(written_.data(), written_.size(), chunk.target + new_row_size * static_cast<std::uint64_t>(chunk.row));
        return read_.size();
    }

   private:
    // Null for a type of integers.
    static const float* to_floats(ggml_type type, const std::vector<char>& data, std::vector<float>& floats, std::int64_t count) {
        floats.resize(static_cast<std::size_t>(count));
        if (type == GGML_TYPE_F32) {
            std::memcpy(floats.data(), data.data(), data.size());
            return floats.data();
        }
        const auto* traits = ggml_get_type_traits(type);
        if (traits->to_float == nullptr) {
            return nullptr;
        }
        traits->to_float(data.data(), floats.data(), count);
        return floats.data();
    }

    const std::vector<std::unique_ptr<InputFile>>& sources_;
    OutputFile& file_;
    std::vector<char> read_, written_;
    std::vector<float> read_floats_, written_floats_;
};

// Threads that are joined whatever happens, and the first of their errors.
class Workers {
   public:
    explicit Workers(std::atomic<bool>& stop) : stop_(stop) {}
    ~Workers() {
        stop_.store(true);
        join();
    }

    template <typename Work>
    void start(const Work& work) {
        threads_.emplace_back([this, work] { run(work); });
    }

    template <typename Work>
    void run(const Work& work) {
        const NativeScope scope;
        try {
            work();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) {
                error_ = std::current_exception();
            }
            stop_.store(true);
        }
    }

    void join() {
        for (auto& thread : threads_) {
            thread.join();
        }
        threads_.clear();
    }

    void rethrow() {
        if (error_) {
            std::rethrow_exception(error_);
        }
    }

   private:
    std::atomic<bool>& stop_;
    std::mutex mutex_;
    std::exception_ptr error_;
    std::vector<std::thread> threads_;
};

}  // namespace

float QuantizeControl::share_done() const {
    const std::uint64_t all = all_bytes.load(std::memory_order_acquire);
    return all == 0 ? 0.0f : static_cast<float>(static_cast<double>(done_bytes.load(std::memory_order_relaxed)) / static_cast<double>(all));
}

OutputFile::OutputFile(const std::string& path) : path_(path), descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
    if (descriptor_ < 0) {
        throw_file_error("write", path_);
    }
}

OutputFile::~OutputFile() {
    if (descriptor_ >= 0) {
        ::close(descriptor_);
    }
}

void OutputFile::resize(std::uint64_t bytes) {
    // The room is compared, not reserved: a file system may take longer to remove reserved gigabytes than a stopped caller wants to wait.
    struct statvfs disk {};
    if (::fstatvfs(descriptor_, &disk) == 0 && bytes / disk.f_frsize >= disk.f_bavail) {
        throw FileError(ENOSPC, "no room for '" + path_ + "': it needs " + std::to_string(bytes) + " bytes, the disk has " +
                                    std::to_string(disk.f_bavail * disk.f_frsize) + " left");
    }
    if (::ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) {
        throw_file_error("write", path_);
    }
}

void OutputFile::write(const void* data, std::size_t size, std::uint64_t offset) {
    const auto* at = static_cast<const char*>(data);
    while (size > 0) {
        const ssize_t put = ::pwrite(descriptor_, at, size, static_cast<off_t>(offset));
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put < 0) {
            throw_file_error("write", path_);
        }
        at += put;
        size -= static_cast<std::size_t>(put);
        offset += static_cast<std::uint64_t>(put);
    }
}

void OutputFile::close() {
    const int descriptor = descriptor_;
    descriptor_ = -1;
    if (::close(descriptor) != 0 && errno != EINTR) {  // a network file system may tell only here that a write failed
        throw_file_error("write", path_);
    }
}

void write_quantized(const QuantizePlan& plan, const QuantizeOptions& options, OutputFile& file, QuantizeControl& control) {
    const Imatrix* imatrix = options.imatrix.get();
    check_imatrix(plan, imatrix);
    std::vector<std::unique_ptr<InputFile>> sources;
    for (const auto& path : plan.source.files) {
        sources.push_back(std::make_unique<InputFile>(path));
    }
    file.resize(plan.file_bytes);  // what lies between the tensors stays zero
    file.write(plan.header.data(), plan.header.size(), 0);
    control.all_bytes.store(plan.source.size_bytes, std::memory_order_release);

    ChunkQueue queue(plan, imatrix);
    std::atomic<bool> stop{false};
    Workers workers(stop);
    const auto work = [&] {
        Converter converter(sources, file);
        Chunk chunk;
        while (!stop.load() && !control.cancelled.load() && queue.take(chunk)) {
            control.done_bytes.fetch_add(converter.convert(chunk), std::memory_order_relaxed);
        }
    };
    const int threads = options.threads > 0 ? options.threads : usable_cores();
    for (int i = 1; i < threads; i++) {
        workers.start(work);
    }
    workers.run(work);
    workers.join();
    workers.rethrow();
    if (control.cancelled.load()) {
        throw CancelledError("quantizing '" + plan.source.path + "' was cancelled");
    }
}

}  // namespace llama_moe
