// llama_moe_core_tests [NAME-PART...]: runs the cases whose name contains any of the arguments, all without one.
//
// The program starts itself for two more things: `--case NAME` runs one isolated case, `--worker HOST:PORT` is an RPC worker.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <exception>
#include <mutex>
#include <string_view>

#include "child_process.h"
#include "llama_moe/device.h"
#include "test_support.h"
#include "tiny_model.h"

namespace test {

namespace {
std::atomic<int> failed_checks{0};
}

std::vector<Case> & cases() {
    static std::vector<Case> all;
    return all;
}

void fail(const char * file, int line, const std::string & what) {
    static std::mutex mutex;  // cases check on threads of their own, too
    const std::lock_guard<std::mutex> lock(mutex);
    ++failed_checks;
    std::cerr << file << ":" << line << ": " << what << std::endl;
}

namespace {

bool passes(const std::function<void()> & body) {
    const int before = failed_checks;
    try {
        body();
    } catch (const Stop &) {
        // REQUIRE has reported it
    } catch (const std::exception & error) {
        fail(__FILE__, __LINE__, std::string("exception left the case: ") + error.what());
    }
    return failed_checks == before;
}

bool passes_isolated(const std::string & name) {
    ChildProcess child({"--case", name});
    const int status = child.wait();
    if (status > 1) {
        fail(__FILE__, __LINE__, "the process of the case ended with status " + std::to_string(status));
    }
    return status == 0;
}

int run_isolated(const std::string & name) {
    const auto found = std::find_if(cases().begin(), cases().end(), [&](const auto & test_case) { return test_case.name == name; });
    const bool passed = found != cases().end() && passes(found->body);
    std::cout.flush();
    remove_tiny_model_files();
    // Not exit(): what such a case leaves behind (parked threads, objects given up on purpose) is not to be cleaned up.
    _exit(passed ? 0 : 1);
}

}  // namespace

}  // namespace test

int main(int argc, char ** argv) {
    std::signal(SIGPIPE, SIG_IGN);  // as Python does: writing to a worker that died is an error, not the end of the process
    const std::vector<std::string_view> arguments(argv + 1, argv + argc);
    if (arguments.size() == 2 && arguments[0] == "--case") {
        return test::run_isolated(std::string(arguments[1]));
    }
    if (arguments.size() == 2 && arguments[0] == "--worker") {
        llama_moe::run_worker(std::string(arguments[1]), /*threads=*/1, std::nullopt);
    }
    const auto wanted = [&](const std::string & name) {
        return arguments.empty() ||
               std::any_of(arguments.begin(), arguments.end(), [&](auto part) { return name.find(part) != std::string::npos; });
    };
    int run = 0;
    int failed = 0;
    for (const auto & test_case : test::cases()) {
        if (!wanted(test_case.name)) {
            continue;
        }
        ++run;
        const auto begin = std::chrono::steady_clock::now();
        std::cout << test_case.name << " ... " << std::flush;
        const bool passed = test_case.isolated ? test::passes_isolated(test_case.name) : test::passes(test_case.body);
        failed += passed ? 0 : 1;
        const auto time = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - begin);
        std::cout << (passed ? "ok" : "FAILED") << " (" << time.count() << " ms)" << std::endl;
    }
    std::cout << run - failed << " of " << run << " core tests passed\n";
    return failed == 0 && run > 0 ? 0 : 1;
}
