"""What is measured of this machine, and how it is kept. How fast the machine is, no test says."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_moe
from llama_moe import Device, _core
from llama_moe._machine import machine_id
from llama_moe.bandwidth import Bandwidths, ProductKind, bandwidths, product_kinds
from llama_moe.errors import InvalidOptionError, PlacementError
from tests.support.interrupts import stops_at_ctrl_c

Q4_K = ProductKind("Q4_K", 512)
SOME = {Q4_K, ProductKind("Q4_1", 96), ProductKind("Q6_K", 512, experts=True)}
# What no computer of the next decades comes near to: bytes per second, and seconds of one small operation.
SLOWEST, FASTEST = 1e6, 1e15
LONGEST = 1.0


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_MOE_CACHE", str(tmp_path / "data"))
    return tmp_path / "data" / "bandwidths" / f"{machine_id()}.json"


def measured(**options: Any) -> Bandwidths:
    """Of one thread of the CPU; kept even while other programs compute, as they do where tests run."""
    return bandwidths(**{"devices": [], "threads": 1, "keep_disturbed": True, **options})


def test_a_cpu_is_measured() -> None:
    result = measured(products=SOME)
    assert list(result.devices) == ["CPU"]
    assert (result.machine, result.disk) == (machine_id(), None)
    cpu = result.devices["CPU"]
    assert (cpu.threads, cpu.layout, cpu.any_product) == (1, "packed", None)
    assert {name: set(lengths) for name, lengths in cpu.products.items()} == {"Q4_K": {512}, "Q4_1": {96}}
    assert {name: set(lengths) for name, lengths in cpu.expert_products.items()} == {"Q6_K": {512}}
    rates = [cpu.product("Q4_K", 512), cpu.product("Q4_1", 96), cpu.product("Q6_K", 512, experts=True), cpu.memory, cpu.attention]
    assert all(rate is not None and SLOWEST < rate < FASTEST for rate in rates)
    assert 0 < cpu.operation_seconds < LONGEST
    assert 0 < cpu.graph_seconds < LONGEST
    assert (cpu.copy, cpu.crossing_seconds) == (None, 0.0)
    assert cpu.llama_cpp == llama_moe.build_info()["llama_cpp_commit"]
    text = str(result)
    assert "weights Q4_K, 512" in text
    assert "experts Q6_K, 512" in text
    assert json.loads(json.dumps(result.to_dict()))["devices"]["CPU"]["products"]["Q4_K"]["512"] == cpu.product("Q4_K", 512)


def test_an_accelerator_is_measured_and_kept_by_what_it_is(accelerator: Device, data: Path) -> None:
    result = measured(products=[Q4_K], devices=[accelerator])
    assert list(result.devices) == ["CPU", accelerator.name]
    rates = result.devices[accelerator.name]
    assert rates.hardware == accelerator.description
    assert rates.memory is None
    assert rates.copy is not None
    assert SLOWEST < rates.copy < FASTEST
    assert SLOWEST < rates.product("Q4_K", 512) < FASTEST
    assert 0 < rates.crossing_seconds < LONGEST
    kept = json.loads(data.read_text())["devices"]
    assert any(key.startswith(accelerator.description) for key in kept)
    # By its endpoint, in any case, as well.
    assert list(measured(devices=[accelerator.description.upper()]).devices) == ["CPU", accelerator.name]


def test_every_number_format_of_weights_can_be_measured() -> None:
    with pytest.raises(InvalidOptionError) as refusal:
        _core.measure_products("CPU", 1, "repacked", [("", 256, False)])
    names = str(refusal.value).partition("there are: ")[2].split(", ")
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS", "IQ4_XS", "MXFP4"} <= set(names)
    kinds = [(name, 256, number % 2 == 0) for number, name in enumerate(names)]
    rates = _core.measure_products("CPU", 1, "repacked", kinds).bytes_per_second
    assert len(rates) == len(kinds)
    assert all(SLOWEST < rate < FASTEST for rate in rates)


def test_what_was_measured_is_kept_and_the_rest_is_added(data: Path) -> None:
    first = measured(products=[Q4_K])
    again = measured(products=[Q4_K])
    assert again == first
    more = measured(products=SOME)
    assert more.devices["CPU"].products["Q4_K"] == first.devices["CPU"].products["Q4_K"]
    assert more.devices["CPU"].operation_seconds == first.devices["CPU"].operation_seconds
    assert set(more.devices["CPU"].expert_products) == {"Q6_K"}
    code = "from llama_moe.bandwidth import *; print(bandwidths(devices=[], threads=1).devices['CPU'].products['Q4_K'][512])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(other.stdout) == first.devices["CPU"].products["Q4_K"][512]


def test_it_is_measured_again_when_asked_or_when_the_file_is_of_no_use(data: Path) -> None:
    measured(products=[Q4_K])
    held = json.loads(data.read_text())
    (key,) = held["devices"]

    def rate_after(change: Callable[[], None], **options: Any) -> float:
        held["devices"][key]["products"] = [["Q4_K", 512, False, 123.0]]
        change()
        data.write_text(json.dumps(held))
        return measured(products=[Q4_K], **options).devices["CPU"].products["Q4_K"][512]

    assert rate_after(lambda: None) == 123.0
    assert rate_after(lambda: None, measure_again=True) > SLOWEST
    assert rate_after(lambda: held["devices"][key].update(llama_cpp="another")) > SLOWEST
    held = json.loads(data.read_text())
    assert rate_after(lambda: held["devices"][key].update(llama_moe="another")) > SLOWEST
    assert rate_after(lambda: held.update(format=0)) > SLOWEST


def test_a_corrupted_file_is_replaced(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    data.parent.mkdir(parents=True)
    data.write_text('{"format": 1, "devices"')
    with caplog.at_level(logging.WARNING, "llama_moe"):
        measured()
    assert "is measured again" in caplog.text
    assert list(json.loads(data.read_text())["devices"]) == ["CPU; 1 threads; packed"]
    assert list(data.parent.iterdir()) == [data]


def test_threads_and_layouts_are_kept_apart(data: Path) -> None:
    ways: dict[str, dict[str, Any]] = {"packed": {}, "repacked": {"expert_kernels": "ggml"}, "plain": {"repack": False}}
    for threads, layout in ((1, "packed"), (2, "packed"), (1, "repacked"), (1, "plain")):
        cpu = measured(threads=threads, **ways[layout]).devices["CPU"]
        assert (cpu.threads, cpu.layout) == (threads, layout)
    assert sorted(json.loads(data.read_text())["devices"]) == [
        "CPU; 1 threads; packed",
        "CPU; 1 threads; plain",
        "CPU; 1 threads; repacked",
        "CPU; 2 threads; packed",
    ]


def test_a_disturbed_measurement_is_returned_but_not_kept(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Busy threads, more than there are cores, take them from the measurement.
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * _core.usable_cores())]
    try:
        with caplog.at_level(logging.WARNING, "llama_moe"):
            cpu = measured(products=[Q4_K], keep_disturbed=False).devices["CPU"]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert SLOWEST < cpu.product("Q4_K", 512) < FASTEST
    assert "not kept" in caplog.text
    assert not data.exists()


def test_a_folder_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_MOE_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "llama_moe"):
        assert measured().devices["CPU"].operation_seconds > 0
    assert "cannot be kept" in caplog.text


def test_the_products_of_a_model_are_those_of_its_matrices(tiny_model: Callable[[str], Path], demo_path: Path) -> None:
    info = llama_moe.inspect(tiny_model("qwen3moe"))
    kinds = product_kinds(info)
    assert {kind.type for kind in kinds} == {"F32", "F16"}
    assert ProductKind("F16", 64, experts=True) in kinds
    demo = product_kinds(llama_moe.inspect(demo_path))
    # Its embedding is its output; norms are no matrices.
    assert ProductKind("Q8_0", 576) in demo
    assert ProductKind("Q4_1", 1536, experts=True) in demo
    assert ProductKind("Q4_1", 1536) not in demo
    # gpt-oss's experts have biases, a row for each, which are added.
    assert {kind.type for kind in product_kinds(llama_moe.inspect(tiny_model("gpt-oss"))) if kind.experts} == {"MXFP4"}
    rates = measured(model=info).devices["CPU"]
    assert all(rates.product(kind.type, kind.columns, experts=kind.experts) > SLOWEST for kind in kinds)


# ---- disks


def test_a_disk_is_measured_by_a_file_on_it(tmp_path: Path, demo_path: Path, data: Path) -> None:
    disk = measured(disk=demo_path).disk
    assert disk is not None
    assert SLOWEST < disk.bytes_per_second < FASTEST
    assert disk.method in ("direct", "dropped", "cached")
    assert 0 < disk.bytes_read <= demo_path.stat().st_size
    assert measured(disk=demo_path).disk == disk
    assert len(json.loads(data.read_text())["disks"]) == 1


@pytest.mark.parametrize("known", [False, True])
def test_files_that_measure_no_disk_are_refused(tmp_path: Path, known: bool) -> None:
    if known:
        (tmp_path / "large").write_bytes(bytes(1 << 20))
        assert measured(disk=tmp_path / "large").disk is not None
    with pytest.raises(FileNotFoundError, match="absent"):
        measured(disk=tmp_path / "absent")
    with pytest.raises(InvalidOptionError, match="is not a file"):
        measured(disk=tmp_path)
    (tmp_path / "small").write_bytes(b"x" * 1000)
    with pytest.raises(InvalidOptionError, match="has 1000 bytes"):
        measured(disk=tmp_path / "small")


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"products": [ProductKind("Q9_Z")]}, "no number format of weights 'Q9_Z'; there are: F32, F16"),
        ({"products": [ProductKind("I32")]}, "no number format of weights 'I32'"),
        ({"products": [ProductKind("Q8_K")]}, "no number format of weights 'Q8_K'"),
        ({"products": [ProductKind("Q4_K", 100)]}, "a row of 100 numbers in Q4_K; it must be a multiple of 256"),
        ({"products": [ProductKind("Q4_K", 0)]}, "a row of 0 numbers"),
        ({"products": [ProductKind("F32", 1 << 40)]}, "at most 65536"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "threads is 100000"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        measured(**options)


def test_a_device_that_is_not_there_is_refused_as_by_a_load() -> None:
    with pytest.raises(PlacementError, match="no device 'CUDA7'; there are: CPU"):
        measured(devices=["CUDA7"])


def test_a_worker_that_died_is_an_error() -> None:
    code = """
import llama_moe
from llama_moe.bandwidth import bandwidths
from llama_moe.worker import Worker

with Worker(threads=1) as worker:
    (device,) = llama_moe.add_rpc_device(worker.endpoint)
try:
    bandwidths(devices=[device], threads=1)
except llama_moe.errors.LlamaMoeError as error:
    print(error)
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert asked.stdout.strip()
    assert asked.stderr == ""


def test_ctrl_c_stops_it() -> None:
    kinds = [("F32", 256, False)] * 1000
    stops_at_ctrl_c(lambda: _core.measure_products("CPU", 1, "repacked", kinds))


def test_importing_measures_nothing(tmp_path: Path, data: Path) -> None:
    subprocess.run([sys.executable, "-c", "import llama_moe.bandwidth, llama_moe.prediction"], check=True)
    assert not (tmp_path / "data").exists()
