"""The code blocks of docs/ray.md run in order, on the Ray of these tests."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet
import pytest

import llama_moe.ray
from llama_moe.server import ServerSettings
from tests.support.processes import REPOSITORY

_PAGE = REPOSITORY / "docs" / "ray.md"

pytestmark = [
    pytest.mark.skipif(not _PAGE.is_file(), reason="the pages are not here: an installed package is tested"),
    pytest.mark.usefixtures("ray_machine"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
]


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_code_blocks_run(tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = blocks_of("python")
    (tmp_path / "model.gguf").symlink_to(tiny_model("qwen3moe"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    stand_ins = {"/models/model.gguf": str(tmp_path / "model.gguf"), "/results/answers": str(tmp_path / "answers"), "8000": port}
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


def test_the_configuration_is_one_of_ray_serve() -> None:
    from ray.serve.schema import ServeDeploySchema

    (block,) = blocks_of("json")
    (application,) = ServeDeploySchema(**json.loads(block)).applications
    assert getattr(llama_moe.ray, application.import_path.rpartition(":")[2]) is llama_moe.ray.build_app
    assert {**application.args, "api_key_file": None}.keys() <= {"api_key_file", *(item.name for item in fields(ServerSettings))}
    assert application.deployments[0].name == llama_moe.ray.deployment(ServerSettings(models=["model.gguf"])).name
