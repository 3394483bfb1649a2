"""Which machine this is, and where files for it are kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llama_moe
from llama_moe import _core, _machine
from llama_moe._machine import cpu_name, data_folder, machine_id, ram_bytes

GIB = 1 << 30


def test_the_data_folder_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_MOE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "llama_moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".cache" / "llama_moe"
    monkeypatch.setenv("LLAMA_MOE_CACHE", "/elsewhere")
    assert data_folder() == Path("/elsewhere")


def test_a_machine_has_one_identity_in_every_process() -> None:
    asked = subprocess.run(
        [sys.executable, "-c", "from llama_moe._machine import machine_id; print(machine_id())"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch("[0-9a-f]{12}", machine_id())
    assert asked.stdout.strip() == machine_id()


def test_the_identity_is_of_cpu_cores_and_memory() -> None:
    identity = _machine._identity("A CPU", 8, 16 * GIB)
    others = [_machine._identity("B CPU", 8, 16 * GIB), _machine._identity("A CPU", 4, 16 * GIB), _machine._identity("A CPU", 8, 32 * GIB)]
    assert len({identity, *others}) == 4


def test_the_little_memory_that_the_system_keeps_does_not_matter() -> None:
    assert _machine._identity("A CPU", 8, 16 * GIB - 300_000_000) == _machine._identity("A CPU", 8, 16 * GIB - 500_000_000)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or _core.usable_cores() < 2, reason="needs two cores that can be chosen from")
def test_a_process_on_fewer_cores_is_on_another_machine() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from llama_moe._machine import machine_id; print(machine_id())"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout.strip() != machine_id()


X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9354  32-Core Processor

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
POWER = """processor\t: 0
cpu\t\t: POWER9, altivec supported
"""


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (X86, "AMD EPYC 9354 32-Core Processor"),
        (ARM, "CPU implementer 0x41 CPU part 0xd40"),
        (POWER, "POWER9, altivec supported"),
        ("", ""),
    ],
)
def test_the_cpu_is_named_as_the_system_does(cpuinfo: str, name: str) -> None:
    assert _machine._name_in(_machine._fields(cpuinfo)) == name


def test_this_machine_has_a_name_and_memory() -> None:
    assert cpu_name()
    (cpu,) = [device for device in llama_moe.devices() if device.kind == "cpu"]
    assert ram_bytes() == cpu.memory_total
