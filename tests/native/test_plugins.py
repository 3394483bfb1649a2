"""Packages that bring a backend: what is checked before their library is loaded, and that one which is skipped does no harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_moe
from tests.support.plugins import COMMIT, write_plugin
from tests.support.processes import run_python

# Loads the plug-ins in sys.argv[1], then a model.
PROGRAM = """
import json, logging, sys
sys.path.insert(0, sys.argv[1])
import llama_moe
from dataclasses import asdict
from llama_moe.plugins import plugins

lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
        llama_moe.devices()  # a handler may call what starts llama.cpp
logging.getLogger("llama_moe").addHandler(Keep())

with llama_moe.load(sys.argv[2], devices=[], context_size=64) as engine:
    tokens = engine.generate([1, 2, 3], llama_moe.SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)).tokens
print(json.dumps({"plugins": [asdict(plugin) for plugin in plugins()], "lines": lines, "tokens": len(tokens)}))
"""


def run_with_plugin(folder: Path, model: Path) -> dict[str, Any]:
    """What became of the one plug-in; checks that all else works and that one line was logged."""
    ran = run_python(PROGRAM, folder, model)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    (plugin,) = (plugin for plugin in result["plugins"] if plugin["package"] == "llama-moe-fake")
    assert [line for line in result["lines"] if "llama-moe-fake" in line] == [f"llama-moe-fake 1.2 is skipped: {plugin['reason']}"]
    assert not plugin["loaded"]
    assert result["tokens"] == 2
    return plugin  # type: ignore[no-any-return]


def test_one_for_another_llama_cpp_is_skipped_and_says_which_version_is_wanted(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    plugin = run_with_plugin(write_plugin(tmp_path, llama_cpp_commit="0123456"), tiny_model("llama"))
    assert plugin["broken"]
    assert "0123456" in plugin["reason"]
    assert COMMIT in plugin["reason"]
    assert f'pip install "llama-moe-fake=={llama_moe.__version__}"' in plugin["reason"]


def test_one_whose_driver_is_not_here_is_skipped_and_that_is_no_fault(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    needs = {"library": "libllama_moe_no_such_driver.so.1", "name": "the driver", "advice": "install the driver"}
    plugin = run_with_plugin(write_plugin(tmp_path, needs=needs), tiny_model("llama"))
    assert not plugin["broken"]
    assert plugin["reason"] == "the driver (libllama_moe_no_such_driver.so.1) is not on this machine; install the driver"


def test_one_whose_library_does_not_load_is_skipped(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    folder = write_plugin(tmp_path)
    (folder / "llama_moe_fake" / "libfake.so").write_text("no library")
    plugin = run_with_plugin(folder, tiny_model("llama"))
    assert plugin["broken"]
    # A build with its backends linked in takes none.
    wanted = {"dynamic": "its library does not load", "static": "linked in"}[llama_moe.build_info()["linkage"]]
    assert wanted in plugin["reason"]


def test_one_that_is_half_installed_is_skipped(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    folder = write_plugin(tmp_path)
    (folder / "llama_moe_fake" / "plugin.json").write_text("{}")
    plugin = run_with_plugin(folder, tiny_model("llama"))
    assert plugin["broken"]
    assert "plugin.json" in plugin["reason"]


def test_a_plugin_of_a_package_that_is_gone_is_skipped(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    folder = write_plugin(tmp_path)
    for file in (folder / "llama_moe_fake").iterdir():
        file.unlink()
    (folder / "llama_moe_fake").rmdir()
    plugin = run_with_plugin(folder, tiny_model("llama"))
    assert plugin["broken"]
    assert "llama_moe_fake is missing" in plugin["reason"]
