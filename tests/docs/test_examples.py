"""The scripts of examples/ run to their end, with a model that is given and with the one that they choose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, run_on_one_core

_EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))

pytestmark = pytest.mark.skipif(not _EXAMPLES, reason="the examples are not here: an installed package is tested")

# What each has to say, whatever the model.
_SAYS = {
    "plan": "all in host memory",
    "generate": "{'name': ",
    "batch": "tokens/s together",
    "tools": "arguments: {",
    "routing_heatmap": "of the best fixed choice",
}


@pytest.mark.parametrize("example", _EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs_with_a_model_that_is_given(
    example: Path, models: dict[str, Path], variables: dict[str, str], tmp_path: Path
) -> None:
    ran = run_on_one_core([sys.executable, "-W", "error", str(example), str(models["model.gguf"])], cwd=tmp_path, env=variables)
    assert ran.returncode == 0, ran.stderr
    assert _SAYS[example.stem] in ran.stdout
    assert (tmp_path / "routing.png").exists() == (example.stem == "routing_heatmap")


@pytest.mark.parametrize("example", _EXAMPLES, ids=lambda example: example.stem)
def test_without_one_it_is_the_demo_model(example: Path, variables: dict[str, str], tmp_path: Path) -> None:
    ran = run_on_one_core([sys.executable, "-W", "error", str(example)], cwd=tmp_path, env=variables)
    assert ran.returncode == 0, ran.stderr
    assert _SAYS[example.stem] in ran.stdout


@pytest.mark.parametrize("example", _EXAMPLES, ids=lambda example: example.stem)
def test_an_example_is_a_notebook(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%\n") >= 2
