#include <algorithm>
#include <map>
#include <string>

#include "accelerators.h"
#include "child_process.h"
#include "fit.h"
#include "llama_moe/device.h"
#include "llama_moe/error.h"
#include "llama_moe/plan.h"
#include "model_headers.h"
#include "native_thread.h"
#include "test_support.h"
#include "tiny_model.h"

using namespace llama_moe;
using test::contains;
using test::dense_header;
using test::kMiB;
using test::moe_header;

namespace {

// A measure by hand: the tensors, `cache` bytes for each layer on its device, and `compute` on each accelerator.
struct ByHand {
    const GgufInfo& info;
    std::uint64_t cache = 0;
    std::uint64_t compute = 0;
    int measured = 0;

    Measure measure() {
        return [this](const ResolvedPlacement& placement) {
            measured++;
            std::vector<MemoryRow> rows;
            for (const auto& tensor : placement.tensors) {
                add_bytes(rows, tensor.device, tensor.role == TensorRole::experts ? "experts" : "weights", tensor.bytes);
                if (contains(tensor.name, "attn_q")) {
                    add_bytes(rows, tensor.device, "kv_cache", cache);
                }
            }
            for (const auto& device : placement.accelerators) {
                add_bytes(rows, device, "compute", compute);
            }
            return rows;
        };
    }
};

ModelOptions gpus(const std::vector<std::uint64_t>& sizes) {
    ModelOptions options;
    for (std::size_t i = 0; i < sizes.size(); i++) {
        options.hypothetical_devices.push_back({"GPU" + std::to_string(i), sizes[i], 0});
    }
    return options;
}

PlacementPolicy fit(std::uint64_t reserve = 0) {
    PlacementPolicy policy;
    policy.reserve = reserve;
    return policy;
}

ResolvedPlacement search(ByHand& hand, const ModelOptions& options, const PlacementPolicy& policy = fit()) {
    start_backend();
    const NativeScope scope;
    const Accelerators accelerators(options);
    return fit_placement(hand.info, options, policy, accelerators, hand.measure());
}

std::uint64_t experts_on(const ResolvedPlacement& placement, const std::string& device) {
    std::uint64_t bytes = 0;
    for (const auto& tensor : placement.tensors) {
        bytes += tensor.role == TensorRole::experts && tensor.device == device ? tensor.bytes : 0;
    }
    return bytes;
}

std::map<std::string, std::string> devices_of(const ResolvedPlacement& placement) {
    std::map<std::string, std::string> devices;
    for (const auto& tensor : placement.tensors) {
        devices[tensor.name] = tensor.device;
    }
    return devices;
}

}  // namespace

TEST_CASE("fit keeps the experts that fit, by whole layers from the last one, and part of the next") {
    const auto info = moe_header();  // 4 layers: 3 MiB each besides 3 x 10 MiB of experts; 2 MiB of output
    ByHand hand{info};
    const std::uint64_t others = 14 * kMiB;
    for (const auto& [room, kept, summary] : std::vector<std::tuple<std::uint64_t, std::uint64_t, std::string>>{
             {120, 120, "fit: all experts stay with their layers"},
             {119, 110, "fit: in host memory are the down projections of the experts of layers 0"},
             {100, 100, "fit: in host memory are the up and gate projections of the experts of layers 0"},
             {99, 90, "fit: in host memory are the experts of layers 0"},
             {45, 40, "fit: in host memory are the experts of layers 0-1, up and gate projections of the experts of layers 2"},
             {10, 10, "fit: in host memory are the experts of layers 0-2, up and gate projections of the experts of layers 3"},
             {9, 0, "fit: in host memory are the experts of layers 0-3"}}) {
        const auto placement = search(hand, gpus({others + room * kMiB}));
        CHECK_EQ(experts_on(placement, "GPU0"), kept * kMiB);
        CHECK_EQ(placement.summary, summary);
    }
}

TEST_CASE("fit counts the cache, compute buffers and the reserve") {
    const auto info = moe_header();
    ByHand hand{info, 2 * kMiB, 5 * kMiB};
    const std::uint64_t all = (14 + 120 + 4 * 2 + 5 + 7) * kMiB;
    CHECK_EQ(experts_on(search(hand, gpus({all}), fit(7 * kMiB)), "GPU0"), 120 * kMiB);
    CHECK_EQ(experts_on(search(hand, gpus({all - 1}), fit(7 * kMiB)), "GPU0"), 110 * kMiB);
    auto policy = fit(7 * kMiB);
    policy.vram = all - 11 * kMiB;  // of a larger device
    CHECK_EQ(experts_on(search(hand, gpus({all}), policy), "GPU0"), 100 * kMiB);
    policy.vram = 10 * all;  // but not more than there is
    CHECK_EQ(experts_on(search(hand, gpus({all - 1}), policy), "GPU0"), 110 * kMiB);
}

TEST_CASE("fit says what is missing where") {
    const auto info = moe_header();
    ByHand hand{info};
    const auto error = CHECK_THROWS(DoesNotFitError, search(hand, gpus({14 * kMiB - 1})));
    CHECK(contains(error, "'moe.gguf' does not fit even with all experts in host memory: GPU0 needs 14.00 MiB and has 14.00 MiB"));
    // Host memory: the embedding and the experts that do not fit the accelerator.
    auto policy = fit();
    policy.ram = 41 * kMiB;
    search(hand, gpus({(14 + 80) * kMiB}), policy);
    policy.ram = 41 * kMiB - 1;
    const auto host = CHECK_THROWS(DoesNotFitError, search(hand, gpus({(14 + 80) * kMiB}), policy));
    CHECK(contains(host, "as many experts on accelerators as there is room for: CPU needs 41.00 MiB and has 41.00 MiB"));
    try {
        search(hand, gpus({(14 + 80) * kMiB}), policy);
        CHECK(false);
    } catch (const DoesNotFitError& caught) {
        REQUIRE(caught.shortfalls.size() == 1);
        CHECK_EQ(caught.shortfalls[0].device, "CPU");
        CHECK_EQ(caught.shortfalls[0].missing(), 1u);
    }
}

TEST_CASE("fit leaves what the user has placed where it is") {
    const auto info = moe_header();
    ByHand hand{info};
    auto policy = fit();
    policy.rules = {{"blk\\.3\\.ffn_.*_exps", "CPU"}, {"blk\\.0\\.attn", "CPU"}};
    auto placement = search(hand, gpus({(13 + 60) * kMiB}), policy);
    auto devices = devices_of(placement);
    CHECK_EQ(devices.at("blk.3.ffn_up_exps.weight"), "CPU");
    CHECK_EQ(devices.at("blk.0.attn_q.weight"), "CPU");
    CHECK_EQ(experts_on(placement, "GPU0"), 60 * kMiB);
    CHECK_EQ(devices.at("blk.1.ffn_up_exps.weight"), "GPU0");
    policy.rules = {{"absent", "CPU"}};
    CHECK(contains(CHECK_THROWS(PlacementError, search(hand, gpus({kMiB}), policy)), "no tensor matches 'absent'"));

    auto options = gpus({(3 * 2 + 2 + 30) * kMiB});
    options.gpu_layers = 3;  // the last two layers and the output
    placement = search(hand, options);
    devices = devices_of(placement);
    CHECK_EQ(devices.at("blk.1.attn_q.weight"), "CPU");
    CHECK_EQ(devices.at("blk.2.attn_q.weight"), "GPU0");
    CHECK_EQ(experts_on(placement, "GPU0"), 30 * kMiB);
}

TEST_CASE("fit shares layers out so that most experts stay, equally on equal devices") {
    const auto info = moe_header(8);
    ByHand hand{info, kMiB};
    const auto equal = search(hand, gpus({100 * kMiB, 100 * kMiB}));
    // 8 MiB of cache, 26 of other weights; what is left of 200 holds 16 of the 24 projections, whichever way the layers go.
    CHECK_EQ(experts_on(equal, "GPU0") + experts_on(equal, "GPU1"), 160 * kMiB);
    CHECK(experts_on(equal, "GPU0") >= 70 * kMiB && experts_on(equal, "GPU0") <= 90 * kMiB);

    // The second has four times the memory.
    const auto unequal = search(hand, gpus({50 * kMiB, 200 * kMiB}));
    const std::uint64_t left = (250 - 8 - 26) / 10 * 10;
    CHECK(experts_on(unequal, "GPU0") + experts_on(unequal, "GPU1") >= (left - 20) * kMiB);

    // By free memory the first would get most layers, and has no room for them: its memory is taken by something that comes with none.
    auto options = gpus({40 * kMiB, 40 * kMiB});
    ByHand output_heavy{info, 0};
    CHECK_EQ(experts_on(search(output_heavy, options), "CPU"), 240 * kMiB - 50 * kMiB);
}

TEST_CASE("fit counts no layer that is not loaded") {
    auto info = moe_header();
    info.nextn_layer_count = 1;
    ByHand hand{info};
    const std::uint64_t others = 11 * kMiB;
    CHECK_EQ(experts_on(search(hand, gpus({others + 60 * kMiB})), "GPU0"), 60 * kMiB);
    // A damaged header: tensors of layers beyond those it says it has.
    auto damaged = moe_header();
    damaged.layer_count = 2;
    ByHand other{damaged};
    search(other, gpus({20 * kMiB}));
}

TEST_CASE("memory that a device shares with the host counts there as well") {
    const std::vector<MemoryRow> rows = {{"IGPU", "weights", 5}, {"GPU", "weights", 7}, {"CPU", "weights", 3}};
    const std::vector<Capacity> limits = {{"IGPU", 6, true}, {"GPU", 7, false}, {"CPU", 7, true}};
    const auto missing = shortfalls(rows, limits, 0);
    REQUIRE(missing.size() == 1);
    CHECK_EQ(missing[0].device, "CPU");
    CHECK_EQ(missing[0].needed, 8u);
    CHECK_EQ(shortfalls(rows, {{"GPU", 7, false}}, UINT64_MAX).size(), 1u);  // no overflow
}

TEST_CASE("a plan that was cancelled ends") {
    auto polls = std::make_shared<int>(0);
    struct Interrupt {};
    bool left = false;
    try {
        make_plan(test::tiny_model_file(), gpus({kMiB}), fit(), std::nullopt, [polls] { throw Interrupt{}; });
    } catch (const Interrupt&) {
        left = true;
    } catch (const DoesNotFitError&) {  // it was quicker than the first poll
        left = true;
    }
    CHECK(left);
}

TEST_CASE("fit without accelerators or without experts has nothing to move") {
    const auto dense = dense_header();
    ByHand hand{dense};
    CHECK(search(hand, gpus({14 * kMiB})).overrides.empty());
    CHECK(contains(CHECK_THROWS(DoesNotFitError, search(hand, gpus({14 * kMiB - 1}))), "GPU0"));
    const auto info = moe_header();
    ByHand host{info};
    ModelOptions none;
    none.devices.emplace();
    CHECK(search(host, none).overrides.empty());
    CHECK_EQ(host.measured, 1);
    auto policy = fit();
    policy.ram = 135 * kMiB - 1;
    CHECK(contains(CHECK_THROWS(DoesNotFitError, search(host, none, policy)), "CPU needs 135.00 MiB"));
}

TEST_CASE("a plan is what llama.cpp's dry run says of a GPU that is not there") {
    const auto path = test::tiny_model_file();
    auto options = gpus({64 * kMiB});
    options.hypothetical_devices[0].overhead = 3 * kMiB;
    options.fit_for.context_size = 256;
    PlacementPolicy cpu;
    cpu.kind = PlacementPolicy::Kind::cpu;
    const auto plan = make_plan(path, options, cpu, std::nullopt);
    CHECK(plan.shortfalls.empty());
    std::map<std::string, std::uint64_t> roles;
    for (const auto& row : plan.rows) {
        if (row.device == "GPU0") {
            roles[row.role] = row.bytes;
        }
    }
    CHECK_EQ(roles.count("experts"), 0u);
    CHECK_EQ(roles.at("overhead"), 3 * kMiB);
    CHECK(roles.at("weights") > 0 && roles.at("compute") > 0 && roles.at("kv_cache") > 0);
    CHECK_EQ(plan.layer_devices, (std::vector<std::string>{"GPU0", "GPU0", "GPU0"}));
    CHECK_EQ(plan.tensor_layers.size(), plan.placement.tensors.size());

    options.hypothetical_devices.push_back({"GPU0", kMiB, 0});
    CHECK(contains(CHECK_THROWS(PlacementError, make_plan(path, options, cpu, std::nullopt)), "a name of its own"));
}

TEST_CASE("what does not fit is told what would help") {
    const auto path = test::tiny_model_file();
    auto options = gpus({64 * kMiB});
    options.fit_for.context_size = 4096;
    options.fit_for.max_sequences = 4;
    const auto plan = make_plan(path, options, fit(), std::nullopt);
    std::uint64_t needed = 0;
    std::uint64_t cache = 0;
    PlacementPolicy cpu;
    cpu.kind = PlacementPolicy::Kind::cpu;
    for (const auto& row : make_plan(path, options, cpu, std::nullopt).rows) {
        needed += row.device == "GPU0" ? row.bytes : 0;
        cache += row.device == "GPU0" && row.role == "kv_cache" ? row.bytes : 0;
    }
    options.hypothetical_devices[0].memory = needed - cache / 3;
    try {
        make_plan(path, options, fit(), std::nullopt);
        CHECK(false);
    } catch (const DoesNotFitError& error) {
        REQUIRE(!error.changes.empty());
        CHECK(contains(error.changes.front(), "context_size="));
        CHECK(contains(error.what(), "it would with context_size="));
        // What it says is true, and one step more is not.
        const int size = std::stoi(error.changes.front().substr(error.changes.front().find('=') + 1));
        options.fit_for.context_size = size;
        CHECK(make_plan(path, options, fit(), std::nullopt).shortfalls.empty());
        options.fit_for.context_size = size + 256;
        CHECK_THROWS(DoesNotFitError, make_plan(path, options, fit(), std::nullopt));
    }
}
