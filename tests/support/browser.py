"""A headless Chromium for tests of web pages."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, expect, sync_playwright

__all__ = ["chromium", "watched"]

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")

# Set where a skip would hide that nothing was tested.
_REQUIRED = "LLAMA_MOE_REQUIRE_CHROMIUM"

# A guard against a hang, not a measure: generous enough for a busy machine.
expect.set_options(timeout=120_000)


def find_chromium(playwright: Playwright) -> str:
    """The path of the browser, the system's or the one that `playwright install chromium` puts there.

    Without any it skips the test, or fails it where a browser is required.
    """
    found = next(filter(None, map(shutil.which, (*_NAMES, playwright.chromium.executable_path))), None)
    if found is not None:
        return found
    reason = f"there is no Chromium: none of {', '.join(_NAMES)} is in the PATH (on Debian, apt-get install chromium)"
    if os.environ.get(_REQUIRED):
        pytest.fail(f"{reason}, and {_REQUIRED} is set")
    pytest.skip(reason)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Runs the browser. Until it is closed, this thread cannot run an asyncio event loop."""
    # As root, and in most containers, Chromium's own sandbox does not start; what it shows here is ours.
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=find_chromium(playwright), args=["--no-sandbox"]) as browser,
    ):
        yield browser


def watched(page: Page) -> list[str]:
    """Collects what goes wrong in a page: errors and warnings of its console, a violated Content-Security-Policy among them."""
    troubles: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            troubles.append(f"{message.type}: {message.text}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: troubles.append(f"uncaught: {error}"))
    return troubles
