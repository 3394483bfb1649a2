#include <algorithm>
#include <map>
#include <string>

#include "backend.h"
#include "child_process.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "test_support.h"

using namespace llama_moe;

TEST_CASE("the CPU is a device with memory") {
    const auto all = devices();
    const auto cpu = std::find_if(all.begin(), all.end(), [](const auto& device) { return device.kind == "cpu"; });
    REQUIRE(cpu != all.end());
    CHECK_EQ(cpu->name, "CPU");
    CHECK_EQ(cpu->backend, "CPU");
    CHECK(!cpu->description.empty());
    CHECK(cpu->memory_total > 0 && cpu->memory_free <= cpu->memory_total);
}

TEST_CASE("the CPU is found by name in any case, and an unknown device is not") {
    start_backend();
    CHECK(cpu_device() != nullptr);
    CHECK(find_device("cpu") == cpu_device());
    CHECK(find_device("CPU") == cpu_device());
    CHECK(find_device("CUDA7") == nullptr);
    CHECK(find_device("") == nullptr);
    CHECK(known_devices().find("CPU") != std::string::npos);
    CHECK(!is_accelerator(cpu_device()));
}

TEST_CASE("the build facts are there") {
    const auto list = build_info();
    const std::map<std::string, std::string> facts(list.begin(), list.end());
    for (const char* name : {"version", "llama_cpp_commit", "compiler", "backends"}) {
        CHECK(facts.count(name) == 1 && !facts.at(name).empty());
    }
    CHECK(facts.at("backends").find("RPC") != std::string::npos);
    CHECK(usable_cores() >= 1);
}

TEST_CASE("a worker that is not there is an error, not an abort") {
    CHECK_THROWS(InvalidOptionError, add_rpc_device("nonsense"));
    CHECK_THROWS(InvalidOptionError, run_worker("nonsense", 1, std::nullopt));
    CHECK_THROWS(InvalidOptionError, run_worker("127.0.0.1:50052", -1, std::nullopt));
    const auto message = CHECK_THROWS(Error, add_rpc_device("127.0.0.1:1"));
    CHECK(message.find("no RPC worker at 127.0.0.1:1") != std::string::npos);
}

ISOLATED_TEST_CASE("an RPC worker becomes an accelerator, found by name and by endpoint, once") {
    test::Worker worker;
    const auto added = add_rpc_device(worker.endpoint());
    REQUIRE(added.size() == 1);
    CHECK_EQ(added[0].name, "RPC0");
    CHECK_EQ(added[0].backend, "RPC");
    CHECK_EQ(added[0].kind, "gpu");
    CHECK_EQ(added[0].description, worker.endpoint());
    CHECK(added[0].memory_total > 0);
    const std::size_t count = devices().size();
    CHECK_EQ(add_rpc_device(worker.endpoint()).at(0).name, "RPC0");
    CHECK_EQ(devices().size(), count);
    CHECK(find_device("rpc0") != nullptr);
    CHECK(find_device("rpc0") == find_device(worker.endpoint()));
    REQUIRE(default_accelerators().size() == 1);
    CHECK(default_accelerators()[0] == find_device("RPC0"));
    CHECK(is_accelerator(find_device("RPC0")));
    CHECK(known_devices().find("RPC0 (" + worker.endpoint() + ")") != std::string::npos);

    test::Worker second;
    CHECK_EQ(add_rpc_device(second.endpoint()).at(0).name, "RPC1");
    CHECK_EQ(default_accelerators().size(), 2u);
}
