"""The base wheel, installed: it is complete, fits any CPU, and keeps to itself."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

import llama_moe
from llama_moe import Device, Engine, ExpertPlacement, Model, SamplingParams

elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is not installed; make test-wheel has it")

GREEDY = SamplingParams(max_tokens=24, temperature=0)
MIB = 1 << 20

# What each CPU variant is compiled for, the best first, by the names in /proc/cpuinfo (ggml/src/CMakeLists.txt of llama.cpp).
_AVX2 = {"avx", "f16c", "fma", "avx2", "bmi2"}
_AVX512 = _AVX2 | {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
VARIANTS = {
    "sapphirerapids": _AVX512 | {"avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8"},
    "zen4": _AVX512 | {"avx512vbmi", "avx512_vnni", "avx512_bf16"},
    "cooperlake": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "icelake": _AVX512 | {"avx512vbmi", "avx512_vnni"},
    "cascadelake": _AVX512 | {"avx512_vnni"},
    "cannonlake": _AVX512 | {"avx512vbmi"},
    "skylakex": _AVX512,
    "alderlake": _AVX2 | {"avx_vnni"},
    "haswell": _AVX2,
    "piledriver": {"avx", "f16c", "fma"},
    "ivybridge": {"avx", "f16c"},
    "sandybridge": {"avx"},
    "sse42": {"sse4_2"},
    "x64": set[str](),
}


def installed_files() -> list[Path]:
    wheel = distribution("llama-moe")
    return [Path(str(wheel.locate_file(file))) for file in wheel.files or []]


def libraries() -> list[Path]:
    return [file for file in installed_files() if ".so" in file.suffixes]


def dynamic_tags(library: Path) -> Iterator[tuple[str, str]]:
    with library.open("rb") as file:
        for tag in elffile.ELFFile(file).get_section_by_name(".dynamic").iter_tags():
            for name in ("soname", "needed", "rpath", "runpath"):
                if hasattr(tag, name):
                    yield name, getattr(tag, name)


def test_it_is_the_wheel_that_is_tested() -> None:
    assert Path(llama_moe.__file__).is_relative_to(sysconfig.get_path("platlib"))
    assert llama_moe.build_info()["backends"].split() == ["RPC", "CPU"]


def test_the_best_cpu_variant_is_in_use() -> None:
    flags = set()
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
        if line.startswith("flags"):
            flags = set(line.split())
            break
    best = next(name for name, needed in VARIANTS.items() if needed <= flags)
    info = llama_moe.build_info()
    assert info["cpu_variant"] == best
    assert ("AVX2" in info["cpu_features"].split()) == ("avx2" in flags)
    assert {file.name for file in libraries() if "ggml-cpu-" in file.name} == {f"libllama_moe-ggml-cpu-{name}.so" for name in VARIANTS}


def test_generates_with_the_demo_model_whatever_the_placement(demo_path: Path, dense_path: Path, accelerator: Device) -> None:
    prompt = "The capital of France is"
    with Model(dense_path, devices=[]) as model, Engine(model, context_size=256) as engine:
        expected = engine.generate(prompt, GREEDY).text
    assert expected.startswith(" Paris.")
    for devices, experts in (
        ([], ExpertPlacement.gpu()),
        (accelerator, ExpertPlacement.cpu()),
        (accelerator, ExpertPlacement.cpu_first(10)),
    ):
        with Model(demo_path, devices=devices, experts=experts, repack=False) as model, Engine(model, context_size=256) as engine:
            assert engine.generate(prompt, GREEDY).text == expected
            assert ("RPC" in {tensor.device[:3] for tensor in model.placement}) == bool(devices)


def test_the_command_line_works_and_the_doctor_finds_nothing_broken(tiny_model: Callable[[str], Path]) -> None:
    program = Path(sysconfig.get_path("scripts")) / "llama-moe"
    ran = subprocess.run([program, "doctor", "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    diagnosis = json.loads(ran.stdout)
    assert not diagnosis["broken"]
    assert diagnosis["build"]["linkage"] == "dynamic"
    assert "CPU" in {device["backend"] for device in diagnosis["devices"]}
    ran = subprocess.run(
        [program, "run", tiny_model("llama"), "-p", "x", "-n", "2", "--ctx", "64"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_libraries_have_names_of_their_own() -> None:
    modules = [file for file in libraries() if file.name.startswith("_core")]
    others = [file for file in libraries() if not file.name.startswith("_core")]
    assert len(modules) == 1
    for library in others:
        # auditwheel gives what it adds a name with a hash of it.
        assert library.name.startswith("libllama_moe-ggml") or library.parent.name == "llama_moe.libs", library
    for library in libraries():
        tags = list(dynamic_tags(library))
        for name, value in tags:
            if name in ("soname", "needed"):
                assert not value.startswith(("libggml", "libllama.", "libllama-common")), (library, value)
        assert all(value.startswith("$ORIGIN") for name, paths in tags if "path" in name for value in paths.split(":")), (library, tags)


def test_the_module_shows_one_symbol() -> None:
    (module,) = (file for file in libraries() if file.name.startswith("_core"))
    with module.open("rb") as file:
        symbols = elffile.ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        defined = [symbol for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"]
    assert [symbol.name for symbol in defined if symbol["st_info"]["bind"] != "STB_LOCAL"] == ["PyInit__core"]


def test_the_licences_of_all_that_is_in_it_are_in_it() -> None:
    licences = {file.name: file.read_text(encoding="utf-8") for file in installed_files() if file.parent.name == "licenses"}
    for name, holder in {
        "LICENSE": "llama_moe",
        "llama.cpp.txt": "The ggml authors",
        "llama.cpp-parts.txt": "Mozilla Foundation",
        "nlohmann-json.txt": "Niels Lohmann",
        "cpp-httplib.txt": "yhirose",
        "pybind11.txt": "Wenzel Jakob",
        "libgomp.txt": "GCC RUNTIME LIBRARY EXCEPTION",
    }.items():
        assert holder in licences[name], name
    added = {file.name.split("-")[0] for file in libraries() if file.parent.name == "llama_moe.libs"}
    assert added == {"libgomp"}  # anything else would need its licence here


def test_it_is_small() -> None:
    size = sum(file.stat().st_size for file in installed_files() if file.is_file())
    assert size < 60 * MIB, f"{size / MIB:.1f} MiB"
