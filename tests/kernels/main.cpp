// llama_moe_kernel_tests: the cases of tests/cpp/test_expert_kernels.cpp, with ggml's base library and nothing else of llama.cpp, so that
// they are soon built for another processor.
#include "test_support.h"

namespace test {

static int failed_checks = 0;

std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

void fail(const char* file, int line, const std::string& what) {
    failed_checks++;
    std::cerr << file << ":" << line << ": " << what << std::endl;
}

}  // namespace test

int main() {
    for (const auto& test_case : test::cases()) {
        const int before = test::failed_checks;
        try {
            test_case.body();
        } catch (const test::Stop&) {
            // REQUIRE has reported it
        }
        std::cout << test_case.name << " ... " << (test::failed_checks == before ? "ok" : "FAILED") << std::endl;
    }
    return test::failed_checks == 0 && !test::cases().empty() ? 0 : 1;
}
