"""llama_moe and llama-cpp-python, which brings a llama.cpp of its own, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.processes import run_python

OURS = """
import llama_moe
with llama_moe.load(path, devices=[], experts="gpu", context_size=128) as ours:
    texts["ours"] = ours.generate(prompt, llama_moe.SamplingParams(max_tokens=16, temperature=0)).text
"""
THEIRS = """
import llama_cpp
theirs = llama_cpp.Llama(path, n_ctx=128, verbose=False)
texts["theirs"] = theirs.create_completion(prompt, max_tokens=16, temperature=0)["choices"][0]["text"]
"""
BEGIN = """
import json, sys
path, prompt, texts = sys.argv[1], "The capital of France is", {}
"""
# Theirs once more while an engine of ours is open, and which ggml libraries the process has.
END = """
with llama_moe.load(path, devices=[], experts="gpu", context_size=128) as ours:
    theirs.reset()
    again = theirs.create_completion(prompt, max_tokens=16, temperature=0)["choices"][0]["text"]
    both = ours.generate(prompt, llama_moe.SamplingParams(max_tokens=16, temperature=0)).text
texts["again"] = [both, again]
mapped = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "ggml-base" in line}
print(json.dumps({"texts": texts, "mapped": sorted(mapped)}))
"""


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("order", [[OURS, THEIRS], [THEIRS, OURS]], ids=["ours first", "theirs first"])
def test_both_generate_in_one_process(order: list[str], demo_path: Path, tiny_model: Callable[[str], Path]) -> None:
    ran = run_python("\n".join([BEGIN, *order, END]), demo_path, timeout=240)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    texts = result["texts"]
    assert texts["ours"].startswith(" Paris.")
    assert texts["theirs"].startswith(" Paris.")
    assert texts["again"] == [texts["ours"], texts["theirs"]]
    assert len(result["mapped"]) == 2, "each must have its own ggml"
