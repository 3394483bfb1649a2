"""The page about the core's locks knows all of them."""

from __future__ import annotations

import re

import pytest

from tests.support.processes import REPOSITORY

_CSRC = REPOSITORY / "csrc"

pytestmark = pytest.mark.skipif(not _CSRC.is_dir(), reason="the sources are not here: an installed package is tested")


def test_every_lock_of_the_core_is_in_the_architecture_page() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    declared = re.compile(r"^\s*(?:mutable |static )*std::(?:recursive_|shared_|timed_)*mutex (\w+);", re.MULTILINE)
    sources = [file for folder in ("core", "bindings") for file in (_CSRC / folder).rglob("*.[hc]*")]
    files = {file.stem for file in sources if declared.search(file.read_text(encoding="utf-8"))}
    assert "engine_core" in files
    for stem in files:
        rows = [line for line in page.splitlines() if f"(`{stem}`)" in line]
        assert rows, f"docs/architecture.md does not mention the locks of {stem}"
