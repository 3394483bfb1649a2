"""The code blocks of docs/ray.md run in order, on the Ray of these tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.support.processes import REPOSITORY

_PAGE = REPOSITORY / "docs" / "ray.md"

pytestmark = [
    pytest.mark.skipif(not _PAGE.is_file(), reason="the pages are not here: an installed package is tested"),
    pytest.mark.usefixtures("ray_machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]


def test_code_blocks_run(tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    stand_ins = {"/models/model.gguf": str(tiny_model("qwen3moe")), "/results/answers": str(tmp_path / "answers")}
    namespace: dict[str, object] = {}
    for block in blocks:
        code = block
        for written, real in stand_ins.items():
            code = code.replace(written, real)
        exec(compile(code, _PAGE.name, "exec"), namespace)
    rows = pyarrow.parquet.read_table(tmp_path / "answers")
    assert rows.column_names == ["id", "prompt", "answer", "tokens"]
    assert sorted(rows["id"].to_pylist()) == list(range(100))
    printed = capsys.readouterr().out
    assert printed.count('"kind"') == 2
    assert "ContextFullError" in printed
