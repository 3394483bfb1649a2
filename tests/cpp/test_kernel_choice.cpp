// When a load computes with our expert kernels.
#include "expert_kernels.h"

#include "llama_moe/device.h"
#include "llama_moe/expert_backend.h"
#include "native_thread.h"
#include "test_support.h"

using namespace llama_moe;

namespace {

KernelChoice choice(const ModelOptions& options, std::uint64_t host_bytes = 1 << 20) {
    ResolvedPlacement placement;
    placement.tensors.push_back({"blk.0.ffn_up_exps.weight", "CPU", TensorRole::experts, host_bytes});
    KernelChoice result;
    start_backend();
    run_native([&] { result = choose_kernels(options, placement, Accelerators(options)); });
    return result;
}

ModelOptions on_the_cpu() {
    ModelOptions options;
    options.devices.emplace();
    return options;
}

bool made_for_this_processor() {
    return experts::kernel_name() != "portable";
}

}  // namespace

TEST_CASE("our kernels are chosen where they are made for the processor") {
    CHECK(choice(on_the_cpu()).packed == made_for_this_processor());
    CHECK(test::contains(choice(on_the_cpu()).reason, made_for_this_processor() ? experts::kernel_name() : "not made for this processor"));
}

TEST_CASE("weights that a packed copy would be too large for stay as they are") {
    const auto too_large = choice(on_the_cpu(), 1ull << 50);
    CHECK(!too_large.packed);
    CHECK(!made_for_this_processor() || test::contains(too_large.reason, "does not fit into the memory"));
}

TEST_CASE("a GPU that computes prompts with weights of host memory finds them as the file has them") {
    auto options = on_the_cpu();
    options.hypothetical_devices.push_back({"GPU", 24ull << 30});
    const auto beside_a_gpu = choice(options);
    CHECK(!beside_a_gpu.packed);
    CHECK(!made_for_this_processor() || test::contains(beside_a_gpu.reason, "the GPU"));
    options.expert_kernels = "llama_moe";
    CHECK(choice(options).packed);
}

TEST_CASE("kernels that are asked for by name are used") {
    auto options = on_the_cpu();
    options.expert_kernels = "ggml";
    CHECK(!choice(options).packed);
    options.expert_kernels = "llama_moe";
    CHECK(choice(options, 1ull << 50).packed);
}
