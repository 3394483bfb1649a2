"""The wheels of plug-ins, where one is installed with the base wheel (make test-wheel-vulkan, make test-wheel-cuda)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import llama_moe
from llama_moe.plugins import has_library
from tests.support.processes import run_python

elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is not installed; make test-wheel has it")

# What the library of each takes from elsewhere: ggml from llama_moe, the rest from the system or NVIDIA's packages.
NEEDED = {
    "llama-moe-cuda13": {"libllama_moe-ggml-base.so", "libcudart.so.13", "libcublas.so.13"},
    "llama-moe-vulkan": {"libllama_moe-ggml-base.so", "libvulkan.so.1"},
}
DRIVERS = {"llama-moe-cuda13": "libcuda.so.1", "llama-moe-vulkan": "libvulkan.so.1"}
PROGRAM = """
import json, logging, sys
import llama_moe
from dataclasses import asdict
from llama_moe.plugins import plugins

lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("llama_moe").addHandler(Keep())

with llama_moe.load(sys.argv[1], context_size=64) as engine:
    tokens = engine.generate([1, 2, 3], llama_moe.SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)).tokens
print(json.dumps({"plugins": [asdict(plugin) for plugin in plugins()], "lines": lines, "tokens": len(tokens)}))
"""


@pytest.fixture(params=list(NEEDED))
def package(request: pytest.FixtureRequest) -> str:
    try:
        distribution(request.param)
    except PackageNotFoundError:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


def files_of(package: str) -> list[Path]:
    installed = distribution(package)
    return [Path(str(installed.locate_file(file))) for file in installed.files or []]


def test_it_carries_its_backend_and_nothing_of_others(package: str) -> None:
    (library,) = (file for file in files_of(package) if ".so" in file.suffixes)
    with library.open("rb") as file:
        tags = list(elffile.ELFFile(file).get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if hasattr(tag, "needed")}
    assert NEEDED[package] <= needed
    system = ("libc.so", "libm.so", "libstdc++", "libgcc_s", "libdl.so", "libpthread", "librt.so", "ld-linux")
    assert not [name for name in needed - NEEDED[package] if not name.startswith(system)]


def test_its_licences_are_in_it(package: str) -> None:
    names = {file.name for file in files_of(package) if file.parent.name == "licenses"}
    assert {"LICENSE", "llama.cpp.txt"} < names


def test_without_a_device_it_is_skipped_with_one_line(
    package: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = DRIVERS[package]
    if has_library(driver):
        if package != "llama-moe-vulkan":
            pytest.skip("the driver is here")
        for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
            monkeypatch.setenv(name, os.devnull)
    ran = run_python(PROGRAM, tiny_model("llama"))
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    (plugin,) = (plugin for plugin in result["plugins"] if plugin["package"] == package)
    assert not plugin["loaded"]
    assert not plugin["broken"], plugin
    assert [line for line in result["lines"] if "skipped" in line] == [f"{package} {plugin['version']} is skipped: {plugin['reason']}"]
    assert result["tokens"] == 2


def test_its_version_is_that_of_llama_moe(package: str) -> None:
    assert distribution(package).version == llama_moe.__version__
    assert f"llama-moe=={llama_moe.__version__}" in (distribution(package).requires or [])
