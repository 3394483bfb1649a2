"""The page at `/`, in a headless Chromium: what somebody sees and does who has nothing but a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect

from llama_moe._sizes import format_size
from tests.support.browser import chromium, watched
from tests.support.servers import ServerProcess
from tests.support.waiting import eventually

HTML = "<img src=x onerror=\"document.title='broken in'\"><b>bold</b>"
PHONE = (360, 740)
LONG = 1 << 17


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def roomy(models_dir: Path) -> Iterator[ServerProcess]:
    """A server of one model with room for an answer that takes longer than any test."""
    with ServerProcess("--model", models_dir / "chat.gguf", "--cpu-moe", "--ctx", LONG, "--parallel", 2, "--threads", 1) as server:
        yield server


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server; whatever its console complains of fails the test."""
    opened: list[tuple[Page, list[str]]] = []

    def open_page(server: ServerProcess, *, size: tuple[int, int] = (1280, 800), scheme: Literal["light", "dark"] = "light") -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        page = context.new_page()
        opened.append((page, watched(page)))
        page.goto(server.url)
        return page

    yield open_page
    for page, troubles in opened:
        page.context.close()
        assert troubles == []


def ask(page: Page, text: str, *, most_tokens: int | None = None) -> None:
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    if most_tokens is not None:
        page.get_by_text("Options").click()
        page.get_by_label("Most tokens").fill(str(most_tokens))
        page.get_by_text("Options").click()
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def never_end(page: Page) -> None:
    """Lets the model go on where it would end its answer."""
    page.route(
        "**/v1/chat/completions", lambda route, request: route.continue_(post_data=json.dumps(body_of(request) | {"ignore_eos": True}))
    )


def answer(page: Page) -> Any:
    return page.locator(".message.assistant").last


def requests_now(server: ServerProcess) -> dict[str, int]:
    found: dict[str, int] = server.client.get("/v1/placement").json()["models"][0]["requests"]
    return found


def body_of(request: Request) -> dict[str, Any]:
    body = request.post_data_json
    assert isinstance(body, dict)
    return body


def texts(stream: str) -> str:
    """What a stream of chunks adds up to."""
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


# ---- chat


def test_an_answer_is_what_the_server_sent(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server)
    streams: list[str] = []

    def keep(route: Route) -> None:
        response = route.fetch()
        streams.append(response.text())
        route.fulfill(response=response)

    page.route("**/v1/chat/completions", keep)
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_text("Options").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_text("Options").click()
        ask(page, "Name a river in Italy.", most_tokens=12)
    expect(answer(page).locator(".outcome")).to_contain_text(re.compile(r"^\d+ tokens?"))
    (stream,) = streams
    assert texts(stream).strip()
    assert answer(page).locator(".body").inner_text().split() == texts(stream).split()
    assert body_of(request.value)["temperature"] == 0
    assert body_of(request.value)["messages"] == [{"role": "user", "content": "Name a river in Italy."}]
    expect(page.get_by_role("log")).to_contain_text("Name a river in Italy.")
    expect(page.locator("#chat-state")).to_have_text("The answer is complete.")


def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(open_page: Open, roomy: ServerProcess) -> None:
    page = open_page(roomy)
    never_end(page)
    ask(page, "Count from one to a thousand, in words.")
    expect(answer(page).locator(".body")).to_contain_text(re.compile(r"\w"))
    assert answer(page).get_attribute("aria-busy") == "true"
    assert requests_now(roomy)["running"] == 1
    page.get_by_role("button", name="Stop").click()
    expect(answer(page).locator(".outcome")).to_have_text("stopped")
    assert answer(page).get_attribute("aria-busy") == "false"
    assert eventually(lambda: requests_now(roomy) == {"running": 0, "waiting": 0})
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_a_conversation_goes_on_also_after_a_reload(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server)
    ask(page, "One, two,", most_tokens=4)
    expect(answer(page).locator(".outcome")).to_be_visible()
    page.reload()
    expect(page.locator(".message")).to_have_count(2)
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "And then?")
    roles = [message["role"] for message in body_of(request.value)["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert body_of(request.value)["max_tokens"] == 4
    expect(answer(page).locator(".outcome")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("log")).to_contain_text("Ask the model something")


def test_an_error_is_shown_and_the_question_kept(browser: Browser, server: ServerProcess) -> None:
    page = browser.new_context().new_page()
    page.goto(server.url)
    question = "word " * 400
    ask(page, question)
    expect(page.get_by_role("alert").last).to_contain_text("tokens")
    expect(page.get_by_label("Message")).to_have_value(question)
    page.context.close()


def test_html_of_the_user_and_of_the_model_is_text(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server)

    def demand_html(route: Route, request: Request) -> None:
        """Lets the real model answer with nothing but HTML, in a JSON string."""
        schema = {"name": "html", "schema": {"const": HTML}}
        body = body_of(request) | {"response_format": {"type": "json_schema", "json_schema": schema}}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", demand_html)
    ask(page, f"Say {HTML}")
    expect(answer(page).locator(".outcome")).to_be_visible()
    assert json.loads(answer(page).locator(".body").inner_text()) == HTML
    assert page.locator(".message.user .body").inner_text() == f"Say {HTML}"
    assert page.locator(".message img, .message b").count() == 0
    assert page.title() == "llama-moe"


def test_thinking_is_kept_apart(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    page.get_by_label("Model", exact=True).select_option("thinks")
    ask(page, "Hello", most_tokens=8)
    expect(answer(page).locator(".outcome")).to_be_visible()
    expect(answer(page).locator(".thinking")).not_to_be_visible()
    answer(page).get_by_text("Thinking").click()
    expect(answer(page).locator(".thinking")).to_be_visible()


def test_code_is_shown_as_code(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server)
    ask(page, "Before\n```python\nif True:\n    print('deep')\n```\nafter", most_tokens=1)
    shown = page.locator(".message.user .body")
    assert shown.locator("pre").inner_text().rstrip() == "if True:\n    print('deep')"
    assert [part.strip() for part in shown.locator(".text").all_inner_texts()] == ["Before", "after"]
    expect(answer(page).locator(".outcome")).to_be_visible()


def test_the_model_that_is_chosen_answers(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server)
    expect(page.locator("#model option")).to_have_text(["chat", "thinks", "tools"])
    page.get_by_label("Model", exact=True).select_option("tools")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Hello", most_tokens=4)
    assert body_of(request.value)["model"] == "tools"
    expect(answer(page).locator(".outcome")).to_be_visible()
    expect(page.locator("#memory caption").filter(has_text="tools")).to_be_visible()


# ---- the server


def test_the_memory_table_is_that_of_the_placement(open_page: Open, roomy: ServerProcess) -> None:
    page = open_page(roomy)
    table = page.locator("#memory table")
    expect(table).to_have_count(1)
    (model,) = roomy.client.get("/v1/placement").json()["models"]
    rows = {(row["device"], row["role"]): row["bytes"] for row in model["memory"]["rows"]}
    found = {}
    for device in table.locator("tbody").all():
        name = device.get_attribute("data-device")
        for line in device.locator("tr.role").all():
            size = line.locator("td")
            found[name, line.get_attribute("data-of")] = int(size.get_attribute("data-bytes") or 0)
            assert size.inner_text() == format_size(rows[name or "", line.get_attribute("data-of") or ""])
    assert found == rows
    expect(table.locator("tfoot td")).to_have_text(format_size(model["memory"]["total_bytes"]))
    expect(table.locator("caption")).to_contain_text("experts: cpu()")


def test_running_requests_are_shown(open_page: Open, roomy: ServerProcess) -> None:
    page = open_page(roomy)
    body = {"messages": [{"role": "user", "content": "Count."}], "n": 3, "ignore_eos": True, "stream": True}
    with roomy.client.stream("POST", "/v1/chat/completions", json=body):
        expect(page.locator("#running")).to_have_text("2")
        expect(page.locator("#waiting")).to_have_text("1")
    expect(page.locator("#running")).to_have_text("0")


def test_the_heatmap_counts_while_it_is_open(open_page: Open, server: ServerProcess) -> None:
    def routing() -> dict[str, Any]:
        (found,) = server.client.get("/v1/routing", params={"model": "chat"}).json()["models"]
        assert isinstance(found, dict)
        return found

    page = open_page(server)
    summary = page.get_by_text("Count which experts are chosen")
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    assert not routing()["tracing"]
    summary.click()
    expect(page.locator("#routing-note")).to_have_text(re.compile("^(Counting. 2 of 4 experts|This model is not loaded. Counting begins)"))
    ask(page, "Name a river in Italy.", most_tokens=8)
    expect(page.locator("#routing-tokens")).to_have_text(re.compile("^[1-9][0-9]* tokens"))
    expect(answer(page).locator(".outcome")).to_be_visible()
    report = routing()
    heatmap = page.get_by_role("application", name=f"{len(report['layers'])} layers by 4 experts")
    drawn = heatmap.evaluate("canvas => canvas.toDataURL()")

    # What the picture shows, in words.
    expect(page.locator("#routing-tokens")).to_have_text(f"{report['tokens']} tokens")
    page.get_by_text("As a table").click()
    lines = page.locator("#heat-table tr")
    expect(lines).to_have_count(len(report["layers"]))
    for line, layer in zip(lines.all(), report["layers"], strict=True):
        most, share = layer["top"][0]
        load = share * report["expert_count"] / report["experts_used"]
        assert line.locator("td").first.inner_text().startswith(f"{most} ({load:.2f})")
        assert line.locator("td").last.inner_text() == str(layer["unused"])

    ask(page, "And one in France.")
    expect(answer(page).locator(".outcome")).to_be_visible()
    expect(page.locator("#routing-tokens")).not_to_have_text(f"{report['tokens']} tokens")
    assert heatmap.evaluate("canvas => canvas.toDataURL()") != drawn

    summary.click()
    assert eventually(lambda: not routing()["tracing"])


def test_a_model_without_experts_has_no_heatmap(open_page: Open, dense: Path) -> None:
    with ServerProcess("--model", dense, "--ctx", 256, "--threads", 1) as server:
        page = open_page(server)
        page.get_by_text("Count which experts are chosen").click()
        expect(page.locator("#routing-note")).to_have_text("This model has no experts.")
        page.context.close()


def test_a_key_is_asked_for_and_used(browser: Browser, models_dir: Path) -> None:
    with ServerProcess("--model", models_dir / "chat.gguf", "--ctx", 256, "--threads", 1, "--api-key", "secret") as server:
        page = browser.new_context().new_page()
        page.goto(server.url)
        field = page.get_by_label("This server needs an API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-refused")).to_have_text("The server does not take this key.")
        field.fill("secret")
        page.keyboard.press("Enter")
        expect(field).not_to_be_visible()
        ask(page, "Hello", most_tokens=4)
        expect(answer(page).locator(".outcome")).to_be_visible()
        page.reload()
        expect(page.locator("#memory table")).to_be_visible()
        page.context.close()


def test_a_server_that_is_gone_is_told_of(browser: Browser, models_dir: Path) -> None:
    with ServerProcess("--model", models_dir / "chat.gguf", "--ctx", 256, "--threads", 1) as server:
        page = browser.new_context().new_page()
        page.goto(server.url)
        expect(page.locator("#memory table")).to_be_visible()
        assert server.stop() == 0
        expect(page.locator("#trouble")).to_have_text("The server cannot be reached")
        page.context.close()


# ---- everybody


def test_the_keyboard_is_enough(open_page: Open, roomy: ServerProcess) -> None:
    page = open_page(roomy)
    keyboard = page.keyboard
    never_end(page)
    expect(page.get_by_label("Model", exact=True)).to_be_enabled()
    expect(page.get_by_label("Message")).to_be_focused()
    keyboard.type("Count from one to a thousand,")
    keyboard.press("Shift+Enter")
    keyboard.type("in words.")
    keyboard.press("Enter")
    expect(answer(page).locator(".body")).to_contain_text(re.compile(r"\w"))
    keyboard.press("Escape")
    expect(answer(page).locator(".outcome")).to_have_text("stopped")
    assert page.locator(".message.user .body").inner_text() == "Count from one to a thousand,\nin words."
    expect(page.get_by_label("Message")).to_be_focused()

    def tab_to(selector: str) -> None:
        for _ in range(20):
            keyboard.press("Tab")
            if page.locator(selector).evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"20 times Tab did not lead to {selector}")

    tab_to("#new-chat")
    tab_to("#routing > summary")
    keyboard.press("Enter")
    expect(page.locator("#routing-view")).to_be_visible()
    tab_to("#heat")
    keyboard.press("ArrowDown")
    keyboard.press("ArrowDown")
    keyboard.press("ArrowRight")
    expect(page.locator("#heat-spoken")).to_have_text(re.compile("^Layer 1, expert 1: chosen"))


def test_everything_has_a_name(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server)
    page.get_by_text("Options").click()
    page.get_by_text("Count which experts are chosen").click()
    expect(page.locator("#routing-view")).to_be_visible()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll(
            "button, select, input, textarea, canvas:not([aria-hidden] *), [role=region], section, aside")]
            .filter(element => !element.labels?.length && !element.textContent.trim()
                && !element.getAttribute("aria-label") && !element.getAttribute("aria-labelledby"))
            .map(element => element.outerHTML)"""
    )
    assert unnamed == []
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page: Open, server: ServerProcess, scheme: Literal["light", "dark"]) -> None:
    page = open_page(server, scheme=scheme)
    ask(page, "Hello\n```\ncode\n```", most_tokens=2)
    expect(answer(page).locator(".outcome")).to_be_visible()
    page.get_by_text("Count which experts are chosen").click()
    expect(page.locator("#routing-view")).to_be_visible()
    background = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert background > 0.8 if scheme == "light" else background < 0.05
    pairs: list[tuple[str, str, str]] = page.evaluate(COLORS_OF_TEXTS)
    assert len(pairs) > 20
    low = {what: contrast(color, behind) for what, color, behind in pairs if contrast(color, behind) < 4.5}
    assert low == {}


# Each text's color, and the first color behind it.
COLORS_OF_TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    let behind = element;
    while (behind && /, 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    found.push([walker.currentNode.data.trim(), getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]);
  }
  return found;
}"""


def luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_a_phone_needs_no_sideways_scrolling(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server, size=PHONE)
    ask(page, f"{'x' * 300}\n```\n{'y' * 300}\n```", most_tokens=4)
    expect(answer(page).locator(".outcome")).to_be_visible()
    page.get_by_text("Options").click()
    page.get_by_text("Count which experts are chosen").click()
    expect(page.locator("#routing-view")).to_be_visible()
    page.get_by_text("As a table").click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, textarea, table, canvas, .message")]
            .filter(element => element.getBoundingClientRect().right > innerWidth).map(element => element.outerHTML)"""
    )
    assert beyond == []


# ---- what it is made of


def test_scripts_of_others_do_not_run(browser: Browser, roomy: ServerProcess) -> None:
    page = browser.new_context().new_page()
    page.goto(roomy.url)
    violated = page.evaluate(
        """() => new Promise(resolve => {
            document.addEventListener("securitypolicyviolation", event => resolve(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "document.title = 'broken in'";
            document.body.append(script);
        })"""
    )
    assert violated == "script-src-elem"
    assert page.title() == "llama-moe"
    page.context.close()


def test_its_files_come_with_the_policy_and_nothing_else_comes(server: ServerProcess) -> None:
    client = server.client
    home = client.get("/")
    names = re.findall(r'(?:href|src)="(page/[^"]+)"', home.text)
    assert {"page/app.js", "page/style.css", "page/icon.svg"} <= set(names)
    for name in names:
        answer = client.get(f"/{name}").raise_for_status()
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert client.get(f"/{name}", headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    assert client.head("/").status_code == 200
    for path in ("/page/", "/page/missing.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py"):
        assert client.get(path).status_code == 404


def test_it_asks_no_other_server_for_anything(browser: Browser, roomy: ServerProcess) -> None:
    context = browser.new_context()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(roomy.url)
    expect(page.locator("#memory table")).to_be_visible()
    origin = httpx.URL(roomy.url)
    assert asked
    assert all(httpx.URL(url).host == origin.host and httpx.URL(url).port == origin.port for url in asked)
    context.close()
