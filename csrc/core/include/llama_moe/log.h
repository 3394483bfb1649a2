#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace llama_moe {

// Level numbers are those of Python's logging module.
enum class LogLevel : int { debug = 10, info = 20, warning = 30, error = 40, off = 1000 };

struct LogLine {
    int level;
    std::string text;
};

// Sends llama.cpp's and ggml's log to a bounded queue in place of stderr. Idempotent; called before any other use of llama.cpp.
void capture_native_log();

// Lines below `level` are dropped when they arrive.
void set_log_level(int level);

// Adds a line of ours.
void log_line(LogLevel level, std::string text);

// Takes what has been queued since the last call, oldest first.
std::vector<LogLine> take_log();

// True when take_log() would return something; cheap enough to ask on every call boundary.
bool has_log();

// While alive, keeps the error lines that llama.cpp logs on this thread, so that a failure can say why.
class ErrorLog {
   public:
    ErrorLog();
    ~ErrorLog();
    ErrorLog(const ErrorLog&) = delete;
    ErrorLog& operator=(const ErrorLog&) = delete;

    // The kept lines joined with "; ", or `otherwise` when there are none.
    std::string text(const std::string& otherwise) const;

    void add(const std::string& line) { lines_.push_back(line); }

   private:
    std::vector<std::string> lines_;
    ErrorLog* outer_;
};

// While alive, keeps all that llama.cpp logs on this thread, which then reaches nobody else: for what it tells in no other way.
class LogCapture {
   public:
    LogCapture();
    ~LogCapture();
    LogCapture(const LogCapture&) = delete;
    LogCapture& operator=(const LogCapture&) = delete;

    const std::string& text() const { return text_; }

    void add(const char* text) { text_ += text; }

   private:
    std::string text_;
};

// While alive, what llama.cpp logs on this thread as a warning or an error is a debug line when `expected` says that it was asked
// to fail: a decode that we stop is no error to anybody.
class ExpectedFailure {
   public:
    explicit ExpectedFailure(std::function<bool()> expected);
    ~ExpectedFailure();
    ExpectedFailure(const ExpectedFailure&) = delete;
    ExpectedFailure& operator=(const ExpectedFailure&) = delete;

   private:
    std::function<bool()> expected_;
};

// While alive, all that llama.cpp logs on this thread is a debug line: a model that is opened only to be measured is nobody's news.
class QuietLog {
   public:
    QuietLog();
    ~QuietLog();
    QuietLog(const QuietLog&) = delete;
    QuietLog& operator=(const QuietLog&) = delete;
};

}  // namespace llama_moe
