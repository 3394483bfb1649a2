#include "llama_moe/log.h"

#include <string>
#include <thread>

#include "ggml.h"
#include "llama.h"
#include "test_support.h"

using namespace llama_moe;

namespace {

// llama.cpp's own way to log; its callback is ours once the log is captured.
void native_log(ggml_log_level level, const char* text) {
    ggml_log_callback callback = nullptr;
    void* data = nullptr;
    llama_log_get(&callback, &data);
    callback(level, text, data);
}

struct CapturedLog {
    explicit CapturedLog(LogLevel level) {
        capture_native_log();
        take_log();
        set_log_level(static_cast<int>(level));
    }
    ~CapturedLog() {
        set_log_level(static_cast<int>(LogLevel::warning));
        take_log();
    }
};

std::vector<std::string> texts() {
    std::vector<std::string> result;
    for (const auto& line : take_log()) {
        result.push_back(std::to_string(line.level) + " " + line.text);
    }
    return result;
}

}  // namespace

TEST_CASE("the native log becomes lines with the levels of Python's logging") {
    const CapturedLog captured(LogLevel::debug);
    CHECK(!has_log());
    native_log(GGML_LOG_LEVEL_DEBUG, "a\n");
    native_log(GGML_LOG_LEVEL_INFO, "b\n");
    native_log(GGML_LOG_LEVEL_WARN, "c\n");
    native_log(GGML_LOG_LEVEL_ERROR, "d\r\n");
    CHECK(has_log());
    CHECK_EQ(texts(), (std::vector<std::string>{"10 a", "20 b", "30 c", "40 d"}));
    CHECK(!has_log());
}

TEST_CASE("a line that is logged in parts is one line, at the level it began with") {
    const CapturedLog captured(LogLevel::debug);
    native_log(GGML_LOG_LEVEL_WARN, "loading");
    native_log(GGML_LOG_LEVEL_CONT, " ..");
    native_log(GGML_LOG_LEVEL_CONT, ".\n");
    native_log(GGML_LOG_LEVEL_INFO, "no end");
    native_log(GGML_LOG_LEVEL_ERROR, "next\n");
    CHECK_EQ(texts(), (std::vector<std::string>{"30 loading ...", "20 no end", "40 next"}));
}

TEST_CASE("lines below the level are dropped when they arrive") {
    const CapturedLog captured(LogLevel::error);
    native_log(GGML_LOG_LEVEL_WARN, "quiet\n");
    log_line(LogLevel::info, "quiet");
    log_line(LogLevel::error, "loud");
    CHECK_EQ(texts(), std::vector<std::string>{"40 loud"});
}

TEST_CASE("the queue is bounded and says how many lines it dropped") {
    const CapturedLog captured(LogLevel::debug);
    for (int i = 0; i < 10'003; i++) {
        log_line(LogLevel::info, std::to_string(i));
    }
    const auto lines = texts();
    REQUIRE(lines.size() == 10'001);
    CHECK_EQ(lines.front(), "20 3");
    CHECK_EQ(lines.back(), "30 3 older log lines were dropped");
}

TEST_CASE("ErrorLog keeps the errors of its own thread, whatever the level") {
    const CapturedLog captured(LogLevel::off);
    ErrorLog outer;
    CHECK_EQ(outer.text("none"), "none");
    native_log(GGML_LOG_LEVEL_ERROR, "first\n");
    {
        ErrorLog inner;
        native_log(GGML_LOG_LEVEL_ERROR, "inner\n");
        CHECK_EQ(inner.text(""), "inner");
    }
    std::thread([] { native_log(GGML_LOG_LEVEL_ERROR, "elsewhere\n"); }).join();
    native_log(GGML_LOG_LEVEL_WARN, "only a warning\n");
    native_log(GGML_LOG_LEVEL_ERROR, "second\n");
    CHECK_EQ(outer.text(""), "first; second");
    CHECK(take_log().empty());
}
