#include "llama_moe/log.h"

#include <atomic>
#include <deque>
#include <mutex>

#include "llama.h"
#include "llama_moe/process.h"

namespace llama_moe {
namespace {

constexpr std::size_t kMaxQueuedLines = 10'000;

struct LogQueue {
    std::mutex mutex;
    std::deque<LogLine> lines;
    std::uint64_t dropped = 0;
    std::string partial;  // llama.cpp logs some lines in several calls
    int partial_level = 0;
};

// Never destroyed: threads of ggml may log during static destruction.
LogQueue& queue() {
    static auto* instance = new LogQueue;
    return *instance;
}

std::atomic<int> g_level{static_cast<int>(LogLevel::warning)};
std::atomic<bool> g_has_lines{false};
thread_local ErrorLog* t_error_log = nullptr;
thread_local LogCapture* t_capture = nullptr;
thread_local const std::function<bool()>* t_expected_failure = nullptr;
thread_local bool t_quiet = false;

void append(LogQueue& log, int level, std::string text) {
    if (level < g_level.load(std::memory_order_relaxed)) {
        return;
    }
    if (log.lines.size() == kMaxQueuedLines) {
        log.lines.pop_front();
        log.dropped++;
    }
    log.lines.push_back({level, std::move(text)});
    g_has_lines.store(true, std::memory_order_release);
}

void trim_newlines(std::string& text) {
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) {
        text.pop_back();
    }
}

int to_level(ggml_log_level level, int previous) {
    switch (level) {
        case GGML_LOG_LEVEL_DEBUG: return static_cast<int>(LogLevel::debug);
        case GGML_LOG_LEVEL_WARN: return static_cast<int>(LogLevel::warning);
        case GGML_LOG_LEVEL_ERROR: return static_cast<int>(LogLevel::error);
        case GGML_LOG_LEVEL_CONT: return previous;
        default: return static_cast<int>(LogLevel::info);
    }
}

void on_log(ggml_log_level native_level, const char* text, void* /*user_data*/) {
    if (native_level == GGML_LOG_LEVEL_ERROR && t_error_log != nullptr) {
        std::string line(text);
        trim_newlines(line);
        t_error_log->add(line);
    }
    if (t_capture != nullptr) {
        t_capture->add(text);
        return;
    }
    const bool failure = native_level == GGML_LOG_LEVEL_ERROR || native_level == GGML_LOG_LEVEL_WARN;
    const bool unimportant = t_quiet || (failure && t_expected_failure != nullptr && (*t_expected_failure)());
    auto& log = queue();
    std::lock_guard<std::mutex> lock(log.mutex);
    const int level = unimportant ? static_cast<int>(LogLevel::debug) : to_level(native_level, log.partial_level);
    if (native_level != GGML_LOG_LEVEL_CONT && !log.partial.empty()) {
        append(log, log.partial_level, std::move(log.partial));
        log.partial.clear();
    }
    log.partial_level = level;
    log.partial += text;
    if (!log.partial.empty() && log.partial.back() == '\n') {
        trim_newlines(log.partial);
        append(log, level, std::move(log.partial));
        log.partial.clear();
    }
}

}  // namespace

void capture_native_log() {
    llama_log_set(on_log, nullptr);
}

void set_log_level(int level) {
    g_level.store(level, std::memory_order_relaxed);
}

void log_line(LogLevel level, std::string text) {
    if (forked()) {  // the lock may be one that nobody will give back
        return;
    }
    auto& log = queue();
    std::lock_guard<std::mutex> lock(log.mutex);
    append(log, static_cast<int>(level), std::move(text));
}

bool has_log() {
    return g_has_lines.load(std::memory_order_acquire) && !forked();
}

std::vector<LogLine> take_log() {
    auto& log = queue();
    std::lock_guard<std::mutex> lock(log.mutex);
    std::vector<LogLine> lines(std::make_move_iterator(log.lines.begin()), std::make_move_iterator(log.lines.end()));
    log.lines.clear();
    if (log.dropped > 0) {
        lines.push_back({static_cast<int>(LogLevel::warning), std::to_string(log.dropped) + " older log lines were dropped"});
        log.dropped = 0;
    }
    g_has_lines.store(false, std::memory_order_release);
    return lines;
}

ErrorLog::ErrorLog() : outer_(t_error_log) {
    t_error_log = this;
}

ErrorLog::~ErrorLog() {
    t_error_log = outer_;
}

LogCapture::LogCapture() {
    t_capture = this;
}

LogCapture::~LogCapture() {
    t_capture = nullptr;
}

ExpectedFailure::ExpectedFailure(std::function<bool()> expected) : expected_(std::move(expected)) {
    t_expected_failure = &expected_;
}

ExpectedFailure::~ExpectedFailure() {
    t_expected_failure = nullptr;
}

QuietLog::QuietLog() {
    t_quiet = true;
}

QuietLog::~QuietLog() {
    t_quiet = false;
}

std::string ErrorLog::text(const std::string& otherwise) const {
    if (lines_.empty()) {
        return otherwise;
    }
    std::string joined;
    for (const auto& line : lines_) {
        joined += joined.empty() ? line : "; " + line;
    }
    return joined;
}

}  // namespace llama_moe
