"""Rules of this code that no linter knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

_CORE = REPOSITORY / "csrc" / "core"

pytestmark = pytest.mark.skipif(not _CORE.is_dir(), reason="the sources are not here: an installed package is tested")


def cpp_files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from sorted([*folder.rglob("*.h"), *folder.rglob("*.cpp")])


def includes(file: Path) -> set[str]:
    return set(re.findall(r'^#include [<"]([^>"]+)[>"]', file.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_core_knows_no_python() -> None:
    files = list(cpp_files(_CORE))
    assert files
    assert not [file for file in files if any("Python.h" in name or "pybind11" in name for name in includes(file))]


def test_only_core_sources_include_llama_cpp() -> None:
    outside = list(cpp_files(_CORE / "include", REPOSITORY / "csrc" / "bindings"))
    assert outside
    for file in outside:
        foreign = {name for name in includes(file) if re.fullmatch(r"(llama|ggml|gguf)[a-z-]*\.h", name)}
        assert not foreign, file


def test_only_one_file_includes_the_experimental_header() -> None:
    users = [file.name for file in cpp_files(_CORE, REPOSITORY / "csrc" / "bindings") if "llama-ext.h" in includes(file)]
    assert users == ["native_context.cpp"]


def test_only_one_file_includes_the_internals_of_a_context() -> None:
    users = [file.name for file in cpp_files(_CORE, REPOSITORY / "csrc" / "bindings") if "llama-context.h" in includes(file)]
    assert users == ["eval_callback.cpp"]


def test_llama_cpps_grammars_are_parsed_and_triggered_in_one_file_each() -> None:
    users = [file.name for file in cpp_files(_CORE, REPOSITORY / "csrc" / "bindings") if "llama-grammar.h" in includes(file)]
    assert users == ["grammar_rules.cpp", "grammar_trigger.cpp"]


def test_ggmls_internals_are_behind_two_files() -> None:
    headers = {"ggml-backend-impl.h": ["hypothetical_device.cpp", "worker_graphs.cpp"], "ggml-impl.h": ["worker_graphs.cpp"]}
    for header, users in headers.items():
        assert [file.name for file in cpp_files(_CORE, REPOSITORY / "csrc" / "bindings") if header in includes(file)] == users


def test_the_common_library_is_behind_a_file_for_each_part_of_it() -> None:
    headers = {
        "chat.h": "chat.cpp",
        "json-schema-to-grammar.h": "grammar_text.cpp",
        "reasoning-budget.h": "grammar.cpp",
        "log.h": "device.cpp",
    }
    for header, only_user in headers.items():
        assert {file.name for file in cpp_files(_CORE, REPOSITORY / "csrc" / "bindings") if header in includes(file)} == {only_user}


def test_bindings_release_the_gil_in_one_place() -> None:
    bindings = list(cpp_files(REPOSITORY / "csrc" / "bindings"))
    releasing = {file.name for file in bindings if "GilReleased" in file.read_text(encoding="utf-8")}
    assert releasing == {"bindings.h", "devices.cpp"}  # run_worker never returns
