#include <algorithm>
#include <map>
#include <regex>
#include <string>

#include "child_process.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/placement.h"
#include "model_headers.h"
#include "native_thread.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;
using test::contains;
using test::add_tensor;
using test::dense_header;
using test::kMiB;
using test::moe_header;
using Kind = PlacementPolicy::Kind;

namespace {

PlacementPolicy policy_of(Kind kind, int count = 0) {
    PlacementPolicy policy;
    policy.kind = kind;
    policy.count = count;
    return policy;
}

PlacementPolicy cpu_layers(std::vector<int> layers) {
    auto policy = policy_of(Kind::cpu_layers);
    policy.layers = std::move(layers);
    return policy;
}

PlacementPolicy rules(std::vector<std::pair<std::string, std::string>> list) {
    auto policy = policy_of(Kind::rules);
    policy.rules = std::move(list);
    return policy;
}

ModelOptions on_cpu() {
    ModelOptions options;
    options.devices.emplace();
    return options;
}

ResolvedPlacement resolve(const GgufInfo& info, const PlacementPolicy& policy, const ModelOptions& options = on_cpu()) {
    const NativeScope scope;
    return resolve_placement(info, options, policy);
}

// The tensors of the header that the override given to llama.cpp matches.
std::vector<std::string> matched(const GgufInfo& info, const PlacementPolicy& policy) {
    const auto overrides = resolve(info, policy).overrides;
    REQUIRE(overrides.size() == 1);
    CHECK_EQ(overrides[0].device, "CPU");
    const std::regex pattern(overrides[0].pattern);
    std::vector<std::string> names;
    for (const auto& tensor : info.tensors) {
        if (std::regex_search(tensor.name, pattern)) {
            names.push_back(tensor.name);
        }
    }
    return names;
}

// The expert tensors of some layers.
std::vector<std::string> experts_of(const GgufInfo& info, const std::vector<int>& layers) {
    std::vector<std::string> names;
    for (const auto& tensor : info.tensors) {
        if (tensor.role == TensorRole::experts && std::count(layers.begin(), layers.end(), tensor.layer) > 0) {
            names.push_back(tensor.name);
        }
    }
    return names;
}

std::string placement_error(const GgufInfo& info, const PlacementPolicy& policy, const ModelOptions& options = on_cpu()) {
    return CHECK_THROWS(PlacementError, resolve(info, policy, options));
}

std::map<std::string, std::string> device_of(const ResolvedPlacement& placement) {
    std::map<std::string, std::string> result;
    for (const auto& tensor : placement.tensors) {
        result[tensor.name + (tensor.role == TensorRole::output && tensor.name == "token_embd.weight" ? " (output)" : "")] = tensor.device;
    }
    return result;
}

}  // namespace

TEST_CASE("gpu overrides nothing and lists every tensor once, in file order") {
    const auto info = moe_header();
    const auto placement = resolve(info, policy_of(Kind::gpu));
    CHECK(placement.overrides.empty());
    CHECK(placement.accelerators.empty());
    REQUIRE(placement.tensors.size() == info.tensors.size());
    for (std::size_t i = 0; i < info.tensors.size(); i++) {
        CHECK_EQ(placement.tensors[i].name, info.tensors[i].name);
        CHECK_EQ(placement.tensors[i].device, "CPU");
        CHECK_EQ(placement.tensors[i].bytes, info.tensors[i].bytes);
        CHECK(placement.tensors[i].role == info.tensors[i].role);
    }
}

TEST_CASE("cpu matches all routed experts and nothing else") {
    auto info = moe_header();
    add_tensor(info, "blk.0.ffn_gate_up_exps.weight", kMiB, 0);
    add_tensor(info, "blk.0.ffn_up_chexps.weight", kMiB, 0);
    add_tensor(info, "blk.0.ffn_down_exps.bias", kMiB, 0);
    CHECK_EQ(matched(info, policy_of(Kind::cpu)), experts_of(info, {0, 1, 2, 3}));
}

TEST_CASE("cpu_first, cpu_last and cpu_layers match the experts of their layers") {
    const auto info = moe_header(12);
    CHECK_EQ(matched(info, policy_of(Kind::cpu_first, 1)), experts_of(info, {0}));  // not those of 10 and 11
    CHECK_EQ(matched(info, policy_of(Kind::cpu_first, 2)), experts_of(info, {0, 1}));
    CHECK_EQ(matched(info, policy_of(Kind::cpu_last, 2)), experts_of(info, {10, 11}));
    CHECK_EQ(matched(info, cpu_layers({1, 11})), experts_of(info, {1, 11}));
    CHECK_EQ(matched(info, policy_of(Kind::cpu_first, 12)), matched(info, policy_of(Kind::cpu)));
    CHECK_EQ(matched(info, policy_of(Kind::cpu_last, 12)), matched(info, policy_of(Kind::cpu)));
    CHECK(resolve(info, policy_of(Kind::cpu_first, 0)).overrides.empty());
    CHECK(resolve(info, policy_of(Kind::cpu_last, 0)).overrides.empty());
}

TEST_CASE("projections choose among up, gate and down; a merged gate_up goes with either") {
    auto info = moe_header(1);
    add_tensor(info, "blk.0.ffn_gate_up_exps.weight", kMiB, 0);
    const auto names = [&](std::vector<std::string> projections) {
        auto policy = policy_of(Kind::cpu);
        policy.projections = std::move(projections);
        auto result = matched(info, policy);
        std::sort(result.begin(), result.end());
        return result;
    };
    CHECK_EQ(names({"down"}), std::vector<std::string>{"blk.0.ffn_down_exps.weight"});
    CHECK_EQ(names({"up"}), (std::vector<std::string>{"blk.0.ffn_gate_up_exps.weight", "blk.0.ffn_up_exps.weight"}));
    CHECK_EQ(names({"gate"}), (std::vector<std::string>{"blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_up_exps.weight"}));
    CHECK_EQ(names({"up", "gate", "down"}).size(), 4u);
}

TEST_CASE("a policy that cannot be meant is an error with its value and what would be right") {
    const auto info = moe_header();
    CHECK_EQ(placement_error(info, policy_of(Kind::cpu_first, 5)), "cpu_first(5): the model has 4 layers; give 0 to 4");
    CHECK_EQ(placement_error(info, policy_of(Kind::cpu_first, -1)), "cpu_first(-1): the model has 4 layers; give 0 to 4");
    CHECK_EQ(placement_error(info, policy_of(Kind::cpu_last, 5)), "cpu_last(5): the model has 4 layers; give 0 to 4");
    CHECK_EQ(placement_error(info, cpu_layers({0, 4})), "cpu_layers: there is no layer 4; the model has layers 0-3");
    CHECK(contains(placement_error(info, cpu_layers({-1})), "no layer -1"));
    CHECK(contains(placement_error(info, cpu_layers({})), "cpu_layers is empty"));
    auto policy = policy_of(Kind::cpu);
    policy.projections = {};
    CHECK(contains(placement_error(info, policy), "projections is empty"));
    policy.projections = {"up", "sideways"};
    CHECK(contains(placement_error(info, policy), "'sideways' is not a projection"));
    policy.projections = {"up|attn"};
    CHECK(contains(placement_error(info, policy), "'up|attn' is not a projection"));
}

TEST_CASE("an expert policy on a dense model is an error that says so") {
    for (const auto& policy : {policy_of(Kind::cpu), policy_of(Kind::cpu_first, 1), policy_of(Kind::cpu_last, 1), cpu_layers({0})}) {
        CHECK(contains(placement_error(dense_header(), policy), "'moe.gguf' (architecture llama) has no experts"));
    }
    CHECK(resolve(dense_header(), policy_of(Kind::gpu)).overrides.empty());
}

TEST_CASE("rules that are wrong are errors that show the rule") {
    const auto info = moe_header();
    CHECK(contains(placement_error(info, rules({})), "rules is empty"));
    CHECK_EQ(placement_error(info, rules({{"blk\\.99\\.", "CPU"}})), "no tensor matches 'blk\\.99\\.'; the model has blocks 0-3, with experts in 0-3");
    CHECK(contains(placement_error(info, rules({{"ffn", "CPU"}, {"absent", "CPU"}})), "no tensor matches 'absent'"));
    CHECK(contains(placement_error(info, rules({{"(", "CPU"}})), "'(' is not a valid regular expression"));
    CHECK(contains(placement_error(info, rules({{"ffn", "GPU9"}})), "no device 'GPU9'; there are: CPU"));
    // A rule is a search in the name and may name the CPU in any case.
    CHECK_EQ(resolve(info, rules({{"exps", "cpu"}})).overrides.at(0).device, "CPU");
}

TEST_CASE("devices that are not there are named") {
    auto options = on_cpu();
    options.devices = {{"CUDA0"}};
    CHECK(contains(placement_error(moe_header(), policy_of(Kind::gpu), options), "no device 'CUDA0'; there are: CPU"));
    options.devices = {{"cpu"}};  // the CPU is always there
    CHECK(resolve(moe_header(), policy_of(Kind::gpu), options).accelerators.empty());
}

TEST_CASE("ModelOptions refuses what it cannot mean") {
    ModelOptions options;
    options.gpu_layers = -2;
    CHECK_EQ(CHECK_THROWS(InvalidOptionError, options.validate()), "gpu_layers is -2; it must be -1 (all), 0 or more");
    options = {};
    options.host_memory = "ram";
    CHECK(contains(CHECK_THROWS(InvalidOptionError, options.validate()), "host_memory is 'ram'; it must be one of mmap"));
    const auto gguf = moe_header();
    CHECK_THROWS(InvalidOptionError, resolve(gguf, policy_of(Kind::gpu), options));
}

TEST_CASE("layers that llama.cpp does not load have no place") {
    auto info = moe_header(4);
    info.nextn_layer_count = 1;
    const auto placement = resolve(info, policy_of(Kind::gpu));
    for (const auto& tensor : placement.tensors) {
        CHECK(!contains(tensor.name, "blk.3."));
    }
    CHECK_EQ(placement.tensors.size(), info.tensors.size() - 6);
    // "The last" layers are the last of those that are loaded.
    CHECK_EQ(matched(info, policy_of(Kind::cpu_last, 1)), experts_of(info, {2}));
}

TEST_CASE("a placement can be asked for by file, without loading it") {
    const auto path = test::tiny_model_file();
    const auto tensors = resolve_placement(path, on_cpu(), policy_of(Kind::cpu_first, 1), Poll());
    CHECK_EQ(tensors.size(), read_gguf(path).tensors.size());
    CHECK_THROWS(FileNotFoundError, resolve_placement(path + ".absent", on_cpu(), policy_of(Kind::gpu), Poll()));
    CHECK_THROWS(PlacementError, resolve_placement(path, on_cpu(), policy_of(Kind::cpu_first, 9), Poll()));
}

ISOLATED_TEST_CASE("with an accelerator, policies split the model between it and the host") {
    test::Worker worker;
    add_rpc_device(worker.endpoint());
    const ModelOptions options;  // all devices
    const auto info = moe_header();
    const auto placed = [&](const PlacementPolicy& policy) { return device_of(resolve(info, policy, options)); };

    auto devices = placed(policy_of(Kind::gpu));
    for (const auto& [name, device] : devices) {
        CHECK_EQ(device, name == "token_embd.weight" ? "CPU" : "RPC0");
    }
    devices = placed(policy_of(Kind::cpu));
    for (const auto& [name, device] : devices) {
        CHECK_EQ(device, name == "token_embd.weight" || is_expert_tensor(name) ? "CPU" : "RPC0");
    }
    devices = placed(policy_of(Kind::cpu_first, 1));
    CHECK_EQ(devices.at("blk.0.ffn_up_exps.weight"), "CPU");
    CHECK_EQ(devices.at("blk.0.ffn_up_shexp.weight"), "RPC0");
    CHECK_EQ(devices.at("blk.1.ffn_up_exps.weight"), "RPC0");

    // The first rule that matches wins; a worker can be named by its endpoint.
    devices = placed(rules({{"blk\\.1\\.ffn_down_exps", worker.endpoint()}, {"exps", "CPU"}, {"blk\\.1\\.", "cpu"}}));
    CHECK_EQ(devices.at("blk.1.ffn_down_exps.weight"), "RPC0");
    CHECK_EQ(devices.at("blk.1.ffn_up_exps.weight"), "CPU");
    CHECK_EQ(devices.at("blk.1.attn_q.weight"), "CPU");
    CHECK_EQ(devices.at("blk.2.attn_q.weight"), "RPC0");

    CHECK(contains(placement_error(info, rules({{"exps", "RPC0"}}), on_cpu()), "is not among the model's devices"));
    CHECK(contains(placement_error(info, rules({{"exps", "RPC7"}}), options), "RPC0 (" + worker.endpoint() + ")"));
}

ISOLATED_TEST_CASE("gpu_layers counts the last layers, and the output as one") {
    test::Worker worker;
    add_rpc_device(worker.endpoint());
    const auto info = moe_header();
    for (int count = -1; count <= 6; count++) {
        ModelOptions options;
        options.gpu_layers = count;
        const auto placement = resolve(info, policy_of(Kind::gpu), options);
        const auto devices = device_of(placement);
        const int on_device = count < 0 ? 5 : std::min(count, 5);
        for (int layer = 0; layer < 5; layer++) {
            const auto& device = layer == 4 ? devices.at("output.weight") : devices.at("blk." + std::to_string(layer) + ".attn_q.weight");
            CHECK_EQ(device, layer >= 5 - on_device ? "RPC0" : "CPU");
        }
        CHECK_EQ(placement.host_layers, std::min(4, 5 - on_device));
    }
}

ISOLATED_TEST_CASE("a tied embedding is listed on the host as input and on the accelerator as output") {
    test::Worker worker;
    add_rpc_device(worker.endpoint());
    auto info = moe_header();
    info.tensors.pop_back();  // output.weight
    const auto devices = device_of(resolve(info, policy_of(Kind::gpu), {}));
    CHECK_EQ(devices.at("token_embd.weight"), "CPU");
    CHECK_EQ(devices.at("token_embd.weight (output)"), "RPC0");
    // On the CPU it is there once.
    CHECK_EQ(device_of(resolve(info, policy_of(Kind::gpu))).count("token_embd.weight (output)"), 0u);
}

ISOLATED_TEST_CASE("two accelerators share the layers as their memory says") {
    test::Worker first;
    test::Worker second;
    add_rpc_device(first.endpoint());
    add_rpc_device(second.endpoint());
    const auto placement = resolve(moe_header(8), policy_of(Kind::gpu), {});
    CHECK_EQ(placement.accelerators, (std::vector<std::string>{"RPC0", "RPC1"}));
    REQUIRE(placement.tensor_split.size() == 2);
    const auto devices = device_of(placement);
    CHECK_EQ(devices.at("blk.0.attn_q.weight"), "RPC0");
    CHECK_EQ(devices.at("output.weight"), "RPC1");
    ModelOptions options;
    options.devices = {{"RPC1", "rpc1"}};
    CHECK_EQ(resolve(moe_header(), policy_of(Kind::gpu), options).accelerators, std::vector<std::string>{"RPC1"});
}
