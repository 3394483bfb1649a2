// llama_moe_core_tests [NAME-PART...]: runs the cases whose name contains any of the arguments, all without one.
#include "test_support.h"

#include <algorithm>
#include <exception>
#include <string_view>

namespace test {

namespace {
int failed_checks = 0;
}

std::vector<Case> & cases() {
    static std::vector<Case> all;
    return all;
}

void fail(const char * file, int line, const std::string & what) {
    ++failed_checks;
    std::cerr << file << ":" << line << ": " << what << "\n";
}

} // namespace test

int main(int argc, char ** argv) {
    const std::vector<std::string_view> filters(argv + 1, argv + argc);
    auto wanted = [&](const std::string & name) {
        return filters.empty() ||
               std::any_of(filters.begin(), filters.end(), [&](auto part) { return name.find(part) != std::string::npos; });
    };
    int run = 0;
    int failed_cases = 0;
    for (const auto & test_case : test::cases()) {
        if (!wanted(test_case.name)) {
            continue;
        }
        ++run;
        const int before = test::failed_checks;
        try {
            test_case.body();
        } catch (const test::Stop &) {
            // REQUIRE has reported it
        } catch (const std::exception & error) {
            test::fail(__FILE__, __LINE__, std::string("exception left the case: ") + error.what());
        }
        if (test::failed_checks != before) {
            ++failed_cases;
            std::cerr << "FAILED " << test_case.name << "\n";
        }
    }
    std::cout << run - failed_cases << " of " << run << " core tests passed\n";
    return failed_cases == 0 && run > 0 ? 0 : 1;
}
