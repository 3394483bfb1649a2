"""A plan is what the load then reports, and what fits loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llama_moe
from llama_moe import DeviceSpec, ExpertPlacement, SamplingParams
from llama_moe.bandwidth import Bandwidths, DeviceRates, DiskRate
from llama_moe.errors import DoesNotFitError, InvalidOptionError, PlacementError
from tests.support.http_files import FileServer
from tests.support.tiny_models import ARCHITECTURES, DENSE, MODELS

if TYPE_CHECKING:
    from llama_moe import Device, Plan
    from llama_moe.memory import MemoryReport
    from llama_moe.placement import PlacementLike

Paths = Callable[[str], Path]
NAME = "qwen3moe"
LAYERS = MODELS[NAME].layers


def sizes(report: MemoryReport) -> dict[tuple[str, str], int]:
    return {(row.device, row.role): row.bytes for row in report.rows}


def accelerator_bytes(plan: Plan, device: Device) -> int:
    return plan.memory.by_device()[device.name]


# ---- a plan and the load


@pytest.mark.parametrize("experts", ["gpu", "cpu", ExpertPlacement.cpu_first(2), ExpertPlacement.cpu(projections=["down"])], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_is_what_the_engine_then_reports(name: str, experts: PlacementLike, tiny_model: Paths, accelerator: Device) -> None:
    path = tiny_model(name)
    plan = llama_moe.plan(path, experts=experts, devices=accelerator, context_size=512, max_sequences=2)
    with llama_moe.load(path, experts=experts, devices=accelerator, context_size=512, max_sequences=2, threads=1) as engine:
        assert sizes(plan.memory) == sizes(engine.memory())
        assert plan.placement == engine.model.placement


@pytest.mark.parametrize(
    "options",
    [
        {"host_memory": "pageable"},
        {"host_memory": "pageable", "repack": False},
        {"host_memory": "locked"},
        {"gpu_layers": 2},
        {"gpu_layers": 0},
        {"offload_kv": False},
        {"flash_attention": "off"},
        {"context_pool": 8192, "max_sequences": 8},
        {"micro_batch_size": 32},
        {"context_size": 0},
        {"speculative": llama_moe.Speculative.lookup()},
    ],
    ids=str,
)
def test_it_knows_every_option(options: dict[str, object], tiny_model: Paths, accelerator: Device) -> None:
    path = tiny_model("granitemoe")  # its embedding is tied
    plan = llama_moe.plan(path, experts=ExpertPlacement.cpu_last(1), devices=accelerator, **options)  # type: ignore[arg-type]
    with llama_moe.load(path, experts=ExpertPlacement.cpu_last(1), devices=accelerator, threads=1, **options) as engine:  # type: ignore[arg-type]
        assert sizes(plan.memory) == sizes(engine.memory())


def test_a_quantised_cache(tiny_model: Paths, accelerator: Device) -> None:
    plain = llama_moe.plan(tiny_model(NAME), devices=accelerator)
    plan = llama_moe.plan(tiny_model(NAME), devices=accelerator, kv_type="q8_0")
    with llama_moe.load(tiny_model(NAME), devices=accelerator, kv_type="q8_0", threads=1) as engine:
        assert sizes(plan.memory) == sizes(engine.memory())
    assert sizes(plan.memory)[accelerator.name, "kv_cache"] * 32 == sizes(plain.memory)[accelerator.name, "kv_cache"] * 17


def test_without_an_accelerator(tiny_model: Paths) -> None:
    plan = llama_moe.plan(tiny_model(NAME), devices=[])
    with llama_moe.load(tiny_model(NAME), devices=[], threads=1) as engine:
        assert sizes(plan.memory) == sizes(engine.memory())
    assert plan.device_bytes == 0
    assert plan.host_bytes == plan.memory.total_bytes


def test_after_generating_it_is_still_true(tiny_model: Paths, accelerator: Device) -> None:
    path = tiny_model(NAME)
    plan = llama_moe.plan(path, experts="cpu", devices=accelerator, max_sequences=4)
    with llama_moe.load(path, experts="cpu", devices=accelerator, max_sequences=4, threads=1) as engine:
        engine.generate(["ab" * 300, "cd", "ef", "gh"], SamplingParams(max_tokens=8, temperature=0))
        reported = sizes(engine.memory())
    assert reported.keys() == sizes(plan.memory).keys()
    for key, size in sizes(plan.memory).items():
        assert size == pytest.approx(reported[key], rel=0.02), key


def test_a_plan_allocates_nothing_and_reads_no_weights(tmp_path: Path, tiny_model: Paths) -> None:
    whole = tiny_model(NAME).read_bytes()
    path = tmp_path / "holes.gguf"
    end_of_header = len(whole) - llama_moe.inspect(tiny_model(NAME)).size_bytes
    with path.open("wb") as file:
        file.write(whole[:end_of_header])
        file.truncate(len(whole))  # the weights are holes
    spec = DeviceSpec("GPU", "1GiB")
    assert sizes(llama_moe.plan(path, devices=spec).memory) == sizes(llama_moe.plan(tiny_model(NAME), devices=spec).memory)


# ---- devices that are not there


def test_a_described_device_counts_like_a_gpu(tiny_model: Paths) -> None:
    plan = llama_moe.plan(tiny_model(NAME), devices=DeviceSpec("8 GB card", "8GiB", overhead="0.5GiB"), ram="16GiB")
    assert plan.fits
    assert plan.capacity == {"8 GB card": 8 << 30, "CPU": 16 << 30}
    assert sizes(plan.memory)["8 GB card", "overhead"] == 512 << 20
    assert {tensor.device for tensor in plan.placement if tensor.role == "experts"} == {"8 GB card"}
    assert plan.to_dict()["rows"] == plan.memory.to_dict()["rows"]
    assert plan.to_dict()["fits"] is True
    assert "8 GB card" in str(plan)
    assert "it fits" in str(plan)


def test_what_is_too_small_is_a_plan_that_does_not_fit(tiny_model: Paths) -> None:
    plan = llama_moe.plan(tiny_model(NAME), experts="gpu", devices=DeviceSpec("GPU", "1MiB"), ram=1)
    assert not plan.fits
    assert plan.shortfall["GPU"] == plan.device_bytes - (1 << 20)
    assert plan.shortfall["CPU"] == plan.host_bytes - 1
    assert "GPU is" in str(plan)
    assert "does not fit" in repr(plan)


def test_rules_and_pins_name_described_devices(tiny_model: Paths) -> None:
    plan = llama_moe.plan(
        tiny_model(NAME),
        experts=ExpertPlacement.rules([(r"blk\.0\..*_exps", "B"), ("_exps", "CPU")]),
        devices=[DeviceSpec("A", "1GiB"), DeviceSpec("B", "1GiB")],
        gpu_layers=3,
    )
    devices = {tensor.name: tensor.device for tensor in plan.placement}
    assert devices["blk.0.ffn_up_exps.weight"] == "B"
    assert devices["blk.1.ffn_up_exps.weight"] == "CPU"
    assert plan.layer_devices[:2] == ("CPU", "CPU")
    assert plan.layer_devices[-1] == "B"


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([DeviceSpec("CPU", "1GiB")], "a name of its own"),
        ([DeviceSpec("A", "1GiB"), DeviceSpec("A", "1GiB")], "a name of its own"),
        (["GPU77"], "no device 'GPU77'"),
    ],
)
def test_devices_that_cannot_be(devices: list[DeviceSpec | str], message: str, tiny_model: Paths) -> None:
    with pytest.raises(PlacementError, match=message):
        llama_moe.plan(tiny_model(NAME), devices=devices)


def test_sizes_and_rates_are_checked(tiny_model: Paths) -> None:
    with pytest.raises(InvalidOptionError, match="vram: 'much' is not a size"):
        llama_moe.plan(tiny_model(NAME), devices=DeviceSpec("A", "much"))
    with pytest.raises(InvalidOptionError, match="overhead: -1 is negative"):
        llama_moe.plan(tiny_model(NAME), devices=DeviceSpec("A", "1GiB", overhead=-1))
    with pytest.raises(InvalidOptionError, match="max_sequences is 0"):
        llama_moe.plan(tiny_model(NAME), max_sequences=0)
    with pytest.raises(FileNotFoundError):
        llama_moe.plan("absent.gguf")


# ---- host memory


def test_memory_that_cannot_be_pinned_is_refused(tiny_model: Paths, accelerator: Device) -> None:
    with pytest.raises(InvalidOptionError, match="needs an accelerator that offers pinned host memory"):
        llama_moe.plan(tiny_model(NAME), devices=accelerator, host_memory="pinned")
    assert llama_moe.plan(tiny_model(NAME), devices=DeviceSpec("GPU", "1GiB"), experts="cpu", host_memory="pinned").fits
    with pytest.raises(DoesNotFitError, match="host_memory='pinned' needs") as caught:
        llama_moe.plan(tiny_model(NAME), devices=DeviceSpec("GPU", "1GiB"), experts="cpu", host_memory="pinned", ram=1000)
    assert caught.value.shortfall.keys() == {"CPU"}
    assert caught.value.changes == ("host_memory='mmap'",)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"context_size": 100, "max_sequences": 4}, 4 * 256),
        ({"context_size": 300, "max_sequences": 3}, 3 * 512),
        ({"context_size": 300, "context_pool": 700, "max_sequences": 3}, 768),
        ({"context_size": 0}, 1024),
    ],
    ids=str,
)
def test_the_tokens_that_the_cache_holds(options: dict[str, int], tokens: int, tiny_model: Paths) -> None:
    plan = llama_moe.plan(tiny_model(NAME), devices=DeviceSpec("GPU", "1GiB"), **options)  # type: ignore[arg-type]
    spec = MODELS[NAME]
    assert plan.context_tokens == tokens
    assert sizes(plan.memory)["GPU", "kv_cache"] == tokens * 2 * spec.layers * spec.kv_heads * spec.head_size * 2


# ---- fit


@pytest.fixture
def needed(tiny_model: Paths, accelerator: Device) -> Callable[[int], int]:
    """Bytes on the accelerator with the experts of the first n layers in host memory."""

    def needed(layers: int) -> int:
        plan = llama_moe.plan(tiny_model(NAME), experts=ExpertPlacement.cpu_first(layers), devices=accelerator)
        return accelerator_bytes(plan, accelerator)

    return needed


@pytest.mark.parametrize("layers", range(LAYERS + 1))
def test_what_fits_loads_and_takes_no_more_than_it_may(
    layers: int, needed: Callable[[int], int], tiny_model: Paths, accelerator: Device
) -> None:
    limit = needed(layers)
    policy = ExpertPlacement.fit(vram=limit, reserve=0)
    plan = llama_moe.plan(tiny_model(NAME), experts=policy, devices=accelerator)
    with llama_moe.load(tiny_model(NAME), experts=policy, devices=accelerator, threads=1) as engine:
        assert engine.model.placement == plan.placement
        assert sizes(engine.memory()) == sizes(plan.memory)
    assert plan.fits
    assert accelerator_bytes(plan, accelerator) <= limit
    # As much as by whole layers, or more: parts of a layer too.
    whole = llama_moe.plan(tiny_model(NAME), experts=ExpertPlacement.cpu_first(layers), devices=accelerator)
    assert plan.memory.by_role().get("experts", 0) == whole.memory.by_role().get("experts", 0)
    on_host = plan.placement.by_device()["CPU"]
    assert on_host <= whole.placement.by_device()["CPU"]


def test_one_byte_less_than_nothing_moved_moves_something(needed: Callable[[int], int], tiny_model: Paths, accelerator: Device) -> None:
    policy = ExpertPlacement.fit(vram=needed(0) - 1, reserve=0)
    plan = llama_moe.plan(tiny_model(NAME), experts=policy, devices=accelerator)
    assert plan.summary.startswith("fit: in host memory are the")
    assert accelerator_bytes(plan, accelerator) < needed(0)


def test_the_reserve_stays_free(needed: Callable[[int], int], tiny_model: Paths, accelerator: Device) -> None:
    policy = ExpertPlacement.fit(vram=needed(0) + 1000, reserve=1001)
    plan = llama_moe.plan(tiny_model(NAME), experts=policy, devices=accelerator)
    assert accelerator_bytes(plan, accelerator) + 1001 <= needed(0) + 1000


def test_fit_keeps_the_users_rules(tiny_model: Paths, accelerator: Device) -> None:
    policy = ExpertPlacement.fit(rules=[(r"blk\.2\.ffn_up_exps", "CPU")])
    plan = llama_moe.plan(tiny_model(NAME), experts=policy, devices=accelerator)
    assert {tensor.name for tensor in plan.placement if tensor.role == "experts" and tensor.device == "CPU"} == {"blk.2.ffn_up_exps.weight"}


def test_fit_that_cannot_be_says_what_would_help(tiny_model: Paths, accelerator: Device) -> None:
    path = tiny_model(NAME)
    least = llama_moe.plan(path, experts="cpu", devices=accelerator, context_size=2048, max_sequences=4)
    cache = sizes(least.memory)[accelerator.name, "kv_cache"]
    policy = ExpertPlacement.fit(vram=accelerator_bytes(least, accelerator) - cache // 3, reserve=0)
    with pytest.raises(DoesNotFitError, match=f"{accelerator.name} needs .* short") as caught:
        llama_moe.load(path, experts=policy, devices=accelerator, context_size=2048, max_sequences=4)
    assert caught.value.shortfall.keys() == {accelerator.name}
    changes = dict(change.split("=") for change in caught.value.changes)
    assert {"context_size", "max_sequences", "gpu_layers"} <= changes.keys()
    for name, value in changes.items():
        options: dict[str, object] = {"context_size": 2048, "max_sequences": 4}
        options[name] = value.strip("'") if name == "kv_type" else int(value)
        assert llama_moe.plan(path, experts=policy, devices=accelerator, **options).fits, name  # type: ignore[arg-type]


def test_fit_checks_host_memory(tiny_model: Paths, accelerator: Device) -> None:
    with pytest.raises(DoesNotFitError, match="CPU needs") as caught:
        llama_moe.load(tiny_model(NAME), experts=ExpertPlacement.fit(ram=1000), devices=accelerator)
    assert caught.value.shortfall.keys() == {"CPU"}
    with pytest.raises(DoesNotFitError, match="CPU needs"):
        llama_moe.plan(tiny_model(NAME), devices=accelerator, ram=1000)


def test_fit_of_a_model_without_experts(tiny_model: Paths, accelerator: Device) -> None:
    with llama_moe.load(tiny_model(DENSE), devices=accelerator, threads=1) as engine:
        assert set(engine.model.placement.by_device()) == {"CPU", accelerator.name}
    with pytest.raises(DoesNotFitError, match=accelerator.name):
        llama_moe.load(tiny_model(DENSE), experts=ExpertPlacement.fit(vram=1000, reserve=0), devices=accelerator)


def test_two_equal_devices_get_equal_shares(tiny_model: Paths) -> None:
    roomy = llama_moe.plan(tiny_model(NAME), experts="gpu", devices=[DeviceSpec("A", "1GiB"), DeviceSpec("B", "1GiB")], context_size=512)
    limit = max(size for device, size in roomy.memory.by_device().items() if device != "CPU") - 10_000
    plan = llama_moe.plan(
        tiny_model(NAME),
        experts=ExpertPlacement.fit(reserve=0),
        devices=[DeviceSpec("A", limit), DeviceSpec("B", limit)],
        context_size=512,
    )
    assert plan.fits
    assert "in host memory" in plan.summary
    assert {plan.layer_devices.count(name) for name in ("A", "B")} <= {LAYERS // 2, LAYERS // 2 + 1}


# ---- models elsewhere, and speeds


def test_a_model_on_a_server_is_planned_from_its_header(tiny_model: Paths) -> None:
    path = tiny_model(NAME)
    with FileServer(path.parent) as server:
        plan = llama_moe.plan(f"{server.url}/{path.name}", devices=DeviceSpec("GPU", "1GiB"))
        assert plan.info.path == f"{server.url}/{path.name}"
    assert sizes(plan.memory) == sizes(llama_moe.plan(path, devices=DeviceSpec("GPU", "1GiB")).memory)


def test_fewer_experts_on_a_slower_memory_are_predicted_to_be_quicker(tiny_model: Paths) -> None:
    plans = [llama_moe.plan(tiny_model(NAME), experts=experts, devices=DeviceSpec("GPU", "1GiB")) for experts in ("gpu", "cpu")]
    host = Bandwidths(machine="stated", cpu="stated", devices={"CPU": DeviceRates.stated("CPU", bytes_per_second=20e9)})
    gpu, cpu = (plan.predict(bandwidths=host) for plan in plans)
    assert gpu.decode_tokens_per_second > 0
    assert "CPU" not in gpu.seconds
    used = sum(tensor.bytes for tensor in plans[1].placement if tensor.role == "experts") * MODELS[NAME].experts_used / MODELS[NAME].experts
    assert cpu.seconds["CPU"]["experts"] == pytest.approx(used / 20e9)
    assert gpu.decode_tokens_per_second > cpu.decode_tokens_per_second
    assert "predicted" in str(gpu)


def test_what_does_not_fit_host_memory_is_read_from_the_disk(tiny_model: Paths) -> None:
    plan = llama_moe.plan(tiny_model(NAME), experts="cpu", devices=DeviceSpec("GPU", "1GiB"), ram="300KiB")
    rates = {"CPU": DeviceRates.stated("CPU", bytes_per_second=20e9)}
    with pytest.raises(InvalidOptionError, match="disk_bytes_per_second"):
        plan.predict(bandwidths=Bandwidths(machine="stated", cpu="stated", devices=rates))
    disk = DiskRate(bytes_per_second=1e9, method="direct", bytes_read=1)
    assert plan.predict(bandwidths=Bandwidths(machine="stated", cpu="stated", devices=rates, disk=disk)).seconds["disk"]["experts"] > 0


def test_a_stated_bandwidth_counts(tiny_model: Paths) -> None:
    def seconds(bandwidth: str) -> float:
        plan = llama_moe.plan(tiny_model(NAME), experts="gpu", devices=DeviceSpec("GPU", "1GiB", bandwidth=bandwidth))
        host = Bandwidths(machine="stated", cpu="stated", devices={"CPU": DeviceRates.stated("CPU", bytes_per_second=20e9)})
        return plan.predict(bandwidths=host).seconds["GPU"]["experts"]

    assert seconds("100GB/s") == pytest.approx(10 * seconds("1000GB/s"))
