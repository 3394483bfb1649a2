"""Which tensor goes where: what each policy means, and that llama.cpp put it there."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import gguf
import pytest

from llama_moe import Context, Device, Engine, ExpertPlacement, Model, Placement
from llama_moe.errors import InvalidOptionError, PlacementError
from llama_moe.model import resolve_placement
from tests.support.tiny_models import ARCHITECTURES, DENSE, MODELS

Paths = Callable[[str], Path]
Resolve = Callable[..., Placement]
NAME = "qwen3moe"
SPEC = MODELS[NAME]


def experts_on(placement: Placement, device: str) -> set[str]:
    return {tensor.name for tensor in placement if tensor.role == "experts" and tensor.device == device}


def experts_of(names: Iterable[str], *layers: int) -> set[str]:
    return {name for name in names if int(name.split(".")[1]) in layers}


@pytest.fixture
def resolve(tiny_model: Paths, accelerator: Device) -> Resolve:
    def resolve(experts: ExpertPlacement | Literal["gpu", "cpu", "fit"], name: str = NAME) -> Placement:
        return resolve_placement(tiny_model(name), experts=experts, devices=accelerator)

    return resolve


# ---- what a policy means


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cpu_moves_all_experts_and_nothing_else(name: str, resolve: Resolve, accelerator: Device) -> None:
    gpu, cpu = resolve("gpu", name), resolve("cpu", name)
    experts = set(MODELS[name].expert_tensors)
    assert experts_on(gpu, accelerator.name) == experts_on(cpu, "CPU") == experts
    assert experts_on(gpu, "CPU") == experts_on(cpu, accelerator.name) == set()
    assert [tensor for tensor in gpu if tensor.role != "experts"] == [tensor for tensor in cpu if tensor.role != "experts"]


@pytest.mark.parametrize(
    ("policy", "layers"),
    [
        (ExpertPlacement.cpu_first(0), []),
        (ExpertPlacement.cpu_first(1), [0]),
        (ExpertPlacement.cpu_first(4), [0, 1, 2, 3]),
        (ExpertPlacement.cpu_last(0), []),
        (ExpertPlacement.cpu_last(3), [1, 2, 3]),
        (ExpertPlacement.cpu_layers([3, 1]), [1, 3]),
        (ExpertPlacement.match(r"blk\.2\.ffn_.*_exps"), [2]),
        (ExpertPlacement.rules([(r"blk\.2\.ffn_.*_exps", "cpu"), (r"blk\.0\.ffn_.*_exps", "CPU")]), [0, 2]),
    ],
    ids=repr,
)
def test_a_policy_moves_the_experts_of_its_layers(
    policy: ExpertPlacement, layers: list[int], resolve: Resolve, accelerator: Device
) -> None:
    placement = resolve(policy)
    assert experts_on(placement, "CPU") == experts_of(SPEC.expert_tensors, *layers)
    assert experts_on(placement, accelerator.name) == set(SPEC.expert_tensors) - experts_on(placement, "CPU")


@pytest.mark.parametrize("projection", ["up", "gate", "down"])
@pytest.mark.parametrize("name", [NAME, "gpt-oss", "grovemoe", "deepseek2-merged"])
def test_projections_move_some_matrices_of_each_expert(name: str, projection: Literal["up", "gate", "down"], resolve: Resolve) -> None:
    moved = experts_on(resolve(ExpertPlacement.cpu(projections=[projection]), name), "CPU")
    # A merged matrix holds the gate and up projections and goes with either.
    parts = [projection] if projection == "down" else [projection, "gate_up"]
    assert moved == {name for name in MODELS[name].expert_tensors if re.search(rf"ffn_({'|'.join(parts)})_(ch)?exps", name)}
    assert moved


def test_biases_of_experts_are_experts(resolve: Resolve) -> None:
    moved = experts_on(resolve("cpu", "gpt-oss"), "CPU")
    assert {f"blk.{layer}.ffn_{part}_exps.bias" for layer in range(4) for part in ("gate", "up", "down")} < moved


def test_the_first_rule_that_matches_decides(resolve: Resolve, accelerator: Device) -> None:
    kept = ExpertPlacement.rules([(r"blk\.1\..*_exps", accelerator), (r"_exps", "CPU")])
    assert experts_on(resolve(kept), accelerator.name) == experts_of(SPEC.expert_tensors, 1)
    hidden = ExpertPlacement.rules([(r"_exps", "CPU"), (r"blk\.1\..*_exps", accelerator)])
    assert experts_on(resolve(hidden), accelerator.name) == set()


@pytest.mark.parametrize("spelling", ["name", "lower case", "endpoint"])
def test_a_rule_names_a_device_as_people_do(spelling: str, resolve: Resolve, accelerator: Device) -> None:
    device = {"name": accelerator.name, "lower case": accelerator.name.lower(), "endpoint": accelerator.description}[spelling]
    placement = resolve(ExpertPlacement.rules([(r"blk\.0\..*_exps", device), ("_exps", "Cpu")]))
    assert experts_on(placement, accelerator.name) == experts_of(SPEC.expert_tensors, 0)


def test_a_rule_moves_any_tensor(resolve: Resolve, tiny_model: Paths, accelerator: Device) -> None:
    policy = ExpertPlacement.match(r"\.attn_|output\.weight")
    devices = {tensor.name: tensor.device for tensor in resolve(policy)}
    assert {device for name, device in devices.items() if ".attn_" in name or name == "output.weight"} == {"CPU"}
    assert {device for name, device in devices.items() if ".ffn_" in name} == {accelerator.name}
    with Model(tiny_model(NAME), experts=policy, devices=accelerator, host_memory="pageable", repack=False) as model:
        assert model.memory().by_device() == llama_cpp_model_bytes(model)


def test_bytes_are_those_of_the_file(resolve: Resolve, tiny_model: Paths) -> None:
    in_file = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(tiny_model(NAME)).tensors}
    placement = resolve("cpu")
    assert {tensor.name: tensor.bytes for tensor in placement} == in_file
    assert placement.total_bytes == sum(placement.by_device().values()) == sum(placement.by_role().values()) == sum(in_file.values())


def test_roles_of_tensors(resolve: Resolve) -> None:
    roles = {tensor.name: tensor.role for tensor in resolve("gpu")}
    assert roles["token_embd.weight"] == "embedding"
    assert roles["output.weight"] == "output"
    assert {roles[name] for name in ("output_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q.weight")} == {"weights"}


def test_a_shared_expert_is_no_routed_expert(resolve: Resolve, accelerator: Device) -> None:
    shared = [tensor for tensor in resolve("cpu", "qwen2moe") if "shexp" in tensor.name]
    assert {(tensor.role, tensor.device) for tensor in shared} == {("weights", accelerator.name)}


def test_a_tied_embedding_stands_on_both_devices(resolve: Resolve, tiny_model: Paths, accelerator: Device) -> None:
    def tied(placement: Placement) -> list[tuple[str, str]]:
        return [(tensor.device, tensor.role) for tensor in placement if tensor.name == "token_embd.weight"]

    assert tied(resolve("gpu", "granitemoe")) == [("CPU", "embedding"), (accelerator.name, "output")]
    assert tied(resolve_placement(tiny_model("granitemoe"), experts="gpu", devices=[])) == [("CPU", "embedding")]


@pytest.mark.parametrize(("gpu_layers", "on_accelerator"), [(0, []), (1, []), (3, [2, 3]), (5, [0, 1, 2, 3]), ("all", [0, 1, 2, 3])])
def test_gpu_layers_are_the_last_ones(
    gpu_layers: int | Literal["all"], on_accelerator: list[int], tiny_model: Paths, accelerator: Device
) -> None:
    with Model(tiny_model(NAME), experts="gpu", devices=accelerator, gpu_layers=gpu_layers, host_memory="pageable", repack=False) as model:
        assert experts_on(model.placement, accelerator.name) == experts_of(SPEC.expert_tensors, *on_accelerator)
        output = next(tensor for tensor in model.placement if tensor.role == "output")
        assert output.device == (accelerator.name if gpu_layers else "CPU")
        assert model.memory().by_device() == llama_cpp_model_bytes(model)


# ---- what llama.cpp did


def llama_cpp_model_bytes(model: Model) -> dict[str, int]:
    """llama.cpp's own account of the weights by device."""
    with Context(model, context_size=256, threads=1) as context:
        return dict(breakdown(context, "model"))


def breakdown(user: Context | Engine, *kinds: str) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for _, device, kind, size in user._native.breakdown():
        if kind in kinds:
            sizes[device] += size
    return sizes


@pytest.mark.parametrize(("name", "experts"), [*itertools.product(ARCHITECTURES, ["gpu", "cpu"]), (DENSE, "gpu")])
def test_tensors_counted_before_the_load_are_what_llama_cpp_allocates(
    name: str, experts: Literal["gpu", "cpu"], tiny_model: Paths, accelerator: Device
) -> None:
    with Model(tiny_model(name), experts=experts, devices=accelerator, host_memory="pageable", repack=False) as model:
        assert model.memory().by_device() == llama_cpp_model_bytes(model)


@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("experts", ["gpu", "cpu", "alone"])
def test_the_report_adds_up_to_llama_cpps_account(experts: str, repack: bool, demo_path: Path, accelerator: Device) -> None:
    devices = [] if experts == "alone" else [accelerator]
    policy: Literal["gpu", "cpu"] = "cpu" if experts == "cpu" else "gpu"
    with (
        Model(demo_path, experts=policy, devices=devices, host_memory="pageable", repack=repack) as model,
        Engine(model, context_size=512, max_sequences=2, micro_batch_size=64, threads=1) as engine,
    ):
        report = engine.memory()
        assert report.by_device() == breakdown(engine, "model", "context", "compute")
        roles = {(row.device, row.role): row.bytes for row in report.rows}
        for device in {row.device for row in report.rows}:
            weights = roles.get((device, "experts"), 0) + roles.get((device, "weights"), 0)
            assert weights == breakdown(engine, "model")[device]
            assert roles.get((device, "kv_cache"), 0) == breakdown(engine, "context")[device]
            assert roles.get((device, "compute"), 0) == breakdown(engine, "compute")[device]
        # What is known of the tensors, wherever llama.cpp rearranged none of them.
        experts_bytes = model.placement.by_role()["experts"]
        assert roles["CPU" if policy == "cpu" or not devices else accelerator.name, "experts"] == experts_bytes


def test_a_mapped_file_counts_on_the_host_only_what_is_used_there(demo_path: Path, accelerator: Device) -> None:
    with (
        Model(demo_path, experts="gpu", devices=accelerator, host_memory="mmap", repack=False) as model,
        Engine(model, context_size=256, threads=1) as engine,
    ):
        sizes = {(row.device, row.role): row.bytes for row in engine.memory().rows}
        assert sizes["CPU", "weights"] == model.placement.by_device()["CPU"] == model.placement.by_role()["embedding"]
        assert engine.memory().by_device()[accelerator.name] == breakdown(engine, "model", "context", "compute")[accelerator.name]


def test_offload_kv_false_keeps_the_kv_cache_in_host_memory(tiny_model: Paths, accelerator: Device) -> None:
    with Model(tiny_model(NAME), experts="gpu", devices=accelerator) as model:
        # Keys and values, 4 layers, 2 heads of 32, 2 bytes, 256 tokens.
        size = 2 * 4 * 2 * 32 * 2 * 256
        for offload_kv in (True, False):
            with Context(model, context_size=256, threads=1, offload_kv=offload_kv) as context:
                rows = {row.device: row.bytes for row in context.memory().rows if row.role == "kv_cache"}
            assert rows.get(accelerator.name, 0) == (size if offload_kv else 0)
            # llama.cpp counts the buffer of the logits, which is on the CPU, with the cache.
            assert rows.get("CPU", 0) >= (0 if offload_kv else size)


# ---- what is refused


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ExpertPlacement.match(r"blk\.99\."), r"no tensor matches 'blk\\\.99\\\.'; the model has blocks 0-3, with experts in 0-3"),
        (ExpertPlacement.rules([("_exps", "CPU"), ("nothing", "CPU")]), r"no tensor matches 'nothing'; the model has blocks 0-3"),
        (ExpertPlacement.rules([]), r"rules is empty; give at least one \(regex, device\)"),
        (ExpertPlacement.match("ffn_(up"), r"'ffn_\(up' is not a valid regular expression \(ECMAScript\): "),
        (ExpertPlacement.match("_exps", "CUDA7"), r"no device 'CUDA7'; there are: .*RPC0 \(127\.0\.0\.1:\d+\)"),
        (ExpertPlacement.cpu_first(5), r"cpu_first\(5\): the model has 4 layers; give 0 to 4"),
        (ExpertPlacement.cpu_last(5), r"cpu_last\(5\): the model has 4 layers; give 0 to 4"),
        (ExpertPlacement.cpu_layers([0, 4]), r"cpu_layers: there is no layer 4; the model has layers 0-3"),
        (ExpertPlacement.cpu_layers([]), r"cpu_layers is empty; use gpu\(\)"),
    ],
    ids=lambda value: repr(value) if isinstance(value, ExpertPlacement) else "",
)
def test_a_placement_that_cannot_be_is_an_error(
    policy: ExpertPlacement, message: str, tiny_model: Paths, accelerator: Device, resolve: Resolve
) -> None:
    with pytest.raises(PlacementError, match=message):
        resolve(policy)
    with pytest.raises(PlacementError, match=message):
        Model(tiny_model(NAME), experts=policy, devices=accelerator)


@pytest.mark.parametrize(
    "policy", [ExpertPlacement.cpu(), ExpertPlacement.cpu_first(1), ExpertPlacement.cpu_last(1), ExpertPlacement.cpu_layers([0])], ids=repr
)
def test_a_model_without_experts_has_none_to_place(policy: ExpertPlacement, tiny_model: Paths) -> None:
    with pytest.raises(PlacementError, match=r"\(architecture llama\) has no experts to place; it is a dense model"):
        Model(tiny_model(DENSE), experts=policy, devices=[])


def test_an_unknown_device_is_an_error_that_lists_those_there_are(tiny_model: Paths, accelerator: Device) -> None:
    with pytest.raises(PlacementError, match=rf"no device 'CUDA7'; there are: .*{accelerator.name} \({accelerator.description}\)"):
        Model(tiny_model(NAME), devices=["CUDA7"])


def test_a_rule_cannot_use_a_device_that_the_model_may_not(tiny_model: Paths, accelerator: Device) -> None:
    with pytest.raises(PlacementError, match=rf"'{accelerator.name}' is not among the model's devices; add it to `devices`"):
        Model(tiny_model(NAME), experts=ExpertPlacement.match("_exps", accelerator), devices=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_layers": -2}, "gpu_layers is -2; it must be -1 .* 0 or more"),
        ({"gpu_layers": "most"}, "gpu_layers: 'most' is unknown; expected a number of layers, or 'all'"),
        ({"host_memory": "swap"}, "host_memory is 'swap'; it must be one of mmap, pageable, pinned, locked"),
        ({"host_memory": "pinned"}, "host_memory='pinned' needs an accelerator that offers pinned host memory"),
    ],
)
def test_a_model_option_out_of_range_is_an_error(options: dict[str, object], message: str, tiny_model: Paths) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        Model(tiny_model(NAME), devices=[], **options)  # type: ignore[arg-type]
