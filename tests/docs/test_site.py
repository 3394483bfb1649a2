"""The pages as a site: it builds without a warning, needs nothing of other machines, and has every public name."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from llama_moe.cli.app import app
from tests.support.processes import REPOSITORY

_CONFIG = REPOSITORY / "mkdocs.yml"

pytestmark = pytest.mark.skipif(not _CONFIG.is_file(), reason="the pages are not here: an installed package is tested")

# What users import besides `llama_moe` itself: all that these list as public.
_MODULES = ("llama_moe.errors", "llama_moe.demo_model", "llama_moe.ray", "llama_moe.server")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(_CONFIG), "--site-dir", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site_and_once_in_its_navigation(site: Path) -> None:
    configuration = _CONFIG.read_text(encoding="utf-8")
    for page in (REPOSITORY / "docs").rglob("*.md"):
        name = page.relative_to(REPOSITORY / "docs")
        assert (site / name.with_suffix(".html")).is_file(), name
        assert len(re.findall(rf"^ *- (?:\w+: )?{re.escape(str(name))}$", configuration, flags=re.MULTILINE)) == 1, name


@pytest.mark.parametrize("module", ["llama_moe", *_MODULES])
def test_the_reference_has_every_public_name(site: Path, module: str) -> None:
    html = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    documented = set(re.findall(r'id="(llama_moe\.[\w.]+)"', html))
    names = importlib.import_module(module).__all__
    assert names
    assert not [name for name in names if f"{module}.{name}" not in documented and name != "errors"]


def test_every_public_method_has_its_place(site: Path) -> None:
    html = (site / "api" / "engine.html").read_text(encoding="utf-8")
    for name in ("generate", "stream", "agenerate", "chat", "embed", "score", "memory", "close"):
        assert f'id="llama_moe.Engine.{name}"' in html


def test_a_reader_needs_no_other_machine(site: Path) -> None:
    elsewhere = r"""=["']?(?:https?:)?//"""
    loads = re.compile(rf"""<(?:script|img|iframe)\b[^>]*\bsrc{elsewhere}|<link\b(?=[^>]*\brel=["']?stylesheet)[^>]*\bhref{elsewhere}""")
    for page in site.rglob("*.html"):
        found = loads.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name}: {found.group(0)}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_readme_links_to_what_is_there() -> None:
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert targets
    assert not [target for target in targets if not (REPOSITORY / target).exists()]


def test_the_readme_tells_of_every_command() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    program = get_command(app)
    assert isinstance(program, TyperGroup)
    commands = [name for name, command in program.commands.items() if not command.hidden]
    assert "run" in commands
    assert not [command for command in commands if f"llama-moe {command}" not in readme]
