"""The queue before an engine's sequences: it is bounded, says so, and what waits in it can be stopped like what runs."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from llama_moe import Completion, Engine, Model, SamplingParams, TokenStream
from llama_moe.errors import ClosedError, InvalidOptionError, LlamaMoeError, QueueFullError, RequestTimeoutError
from tests.support.chat_templates import CHATML
from tests.support.interrupts import stops_at_ctrl_c
from tests.support.waiting import eventually

ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
PROMPTS = [[token, token + 1, 7] for token in range(20, 32)]
QUESTION = [{"role": "user", "content": "What is it?"}]


@pytest.fixture
def engine(model: Model) -> Iterator[Engine]:
    """One sequence, two places to wait, and a context that takes a while to fill."""
    with Engine(model, context_size=65536, max_sequences=1, max_queue=2, threads=1) as engine:
        yield engine


@pytest.fixture
def busy(engine: Engine) -> Iterator[TokenStream]:
    """Holds the engine's sequence."""
    with engine.stream("a", ENDLESS) as stream:
        next(stream)
        yield stream


def waiting(engine: Engine) -> int | float:
    return engine.stats()["requests_waiting"]


def assert_still_busy(engine: Engine, busy: TokenStream, *, waits: int = 0) -> None:
    """Nothing else was stopped, and what was stopped waits no longer."""
    assert next(busy).id >= 0
    stats = engine.stats()
    assert (stats["requests_running"], stats["requests_waiting"]) == (1, waits)


@pytest.mark.parametrize("kind", ["stream", "generate", "list", "score", "embed", "chat", "agenerate", "astream", "achat"])
def test_a_full_queue_refuses_with_the_numbers(kind: str, engine: Engine, busy: TokenStream) -> None:
    async def stream() -> None:
        engine.astream("c", SHORT)

    calls: dict[str, Callable[[], object]] = {
        "stream": lambda: engine.stream("c", SHORT),
        "generate": lambda: engine.generate("c", SHORT),
        "list": lambda: engine.generate(["c", "d", "e"], SHORT),
        "score": lambda: engine.score("c"),
        "embed": lambda: engine.embed("c"),
        "chat": lambda: engine.chat(QUESTION, SHORT, template=CHATML),
        "agenerate": lambda: asyncio.run(engine.agenerate(["c", "d"], SHORT)),
        "astream": lambda: asyncio.run(stream()),
        "achat": lambda: asyncio.run(engine.achat(QUESTION, SHORT, template=CHATML)),
    }
    others = engine.stream(["b", "c"], SHORT)
    with pytest.raises(QueueFullError, match=r"2 requests wait \(max_queue is 2\) for 1 sequences"):
        calls[kind]()
    assert_still_busy(engine, busy, waits=2)
    busy.close()
    assert [len(list(other)) for other in others] == [4, 4]
    calls[kind]()  # there is room again


def test_a_queue_has_room_for_one_at_least(model: Model) -> None:
    for size in (0, -1):
        with pytest.raises(InvalidOptionError, match=f"max_queue is {size}"):
            Engine(model, context_size=256, max_queue=size)
    with Engine(model, context_size=256, max_queue=1, threads=1) as engine:
        assert len(engine.generate(PROMPTS[0], SHORT).tokens) == 4


@pytest.fixture(scope="module")
def expected(model: Model) -> list[tuple[int, ...]]:
    with Engine(model, context_size=256, threads=1) as engine:
        return [engine.generate(prompt, SHORT).tokens for prompt in PROMPTS]


def test_a_list_may_be_longer_than_the_queue(engine: Engine, expected: list[tuple[int, ...]]) -> None:
    assert [completion.tokens for completion in engine.generate(PROMPTS, SHORT)] == expected
    assert [stream.read_all().tokens for stream in engine.stream(PROMPTS, SHORT)] == expected
    assert [completion.tokens for completion in asyncio.run(engine.agenerate(PROMPTS, SHORT))] == expected
    assert len(engine.score(PROMPTS)) == len(PROMPTS)
    assert len(engine.embed(PROMPTS)) == len(PROMPTS)


def test_lists_of_many_threads_share_a_queue_that_is_shorter(engine: Engine, expected: list[tuple[int, ...]]) -> None:
    results: list[list[Completion]] = []

    def work() -> None:
        while True:
            try:
                results.append(engine.generate(PROMPTS, SHORT))
            except QueueFullError:
                continue
            return

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[completion.tokens for completion in completions] for completions in results] == [expected] * 4


def test_an_event_loop_does_not_wait_for_room(engine: Engine, busy: TokenStream) -> None:
    async def main() -> None:
        with pytest.raises(QueueFullError):
            engine.astream(["b", "c", "d"], SHORT)
        assert waiting(engine) == 0  # those before the one that was refused are gone

    asyncio.run(main())
    assert_still_busy(engine, busy)


@pytest.mark.parametrize("places", [1, 4], ids=["for room", "for a sequence"])
def test_ctrl_c_stops_a_call_that_waits(places: int, model: Model) -> None:
    with Engine(model, context_size=65536, max_queue=places, threads=1) as engine, engine.stream("a", ENDLESS) as busy:
        next(busy)
        stops_at_ctrl_c(lambda: engine.generate(["b", "c", "d"], SHORT), after=0.1)
        assert_still_busy(engine, busy)


@pytest.mark.parametrize("kind", ["one", "list", "score"])
def test_closing_the_engine_ends_a_call_that_waits(kind: str, engine: Engine, busy: TokenStream) -> None:
    calls: dict[str, Callable[[], object]] = {
        "one": lambda: engine.generate("b", SHORT),
        "list": lambda: engine.generate(PROMPTS, SHORT),  # waits for room
        "score": lambda: engine.score("b"),
    }
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(calls[kind]())
        except LlamaMoeError as error:
            outcomes.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert eventually(lambda: waiting(engine) == (2 if kind == "list" else 1))
    engine.close()
    thread.join(60)
    (outcome,) = outcomes
    if kind == "one":
        assert isinstance(outcome, Completion)
        assert outcome.finish_reason == "cancelled"
    elif kind == "list":
        assert isinstance(outcome, ClosedError)
    else:
        assert isinstance(outcome, LlamaMoeError)
    assert busy.read_all().finish_reason == "cancelled"


@pytest.mark.parametrize("leave", ["cancel", "close", "drop"])
def test_a_request_that_is_left_while_it_waits_frees_its_place(leave: str, engine: Engine, busy: TokenStream) -> None:
    streams = engine.stream(["b", "c"], SHORT)
    for left in range(2):
        stream = streams.pop(0)
        if leave == "cancel":
            stream.cancel()
        elif leave == "close":
            stream.close()
            assert stream.completion.tokens == ()
        del stream
        assert_still_busy(engine, busy, waits=1)
        streams.append(engine.stream(str(left), SHORT))  # takes the place
    assert_still_busy(engine, busy, waits=2)
    busy.close()
    assert [len(list(stream)) for stream in streams] == [4, 4]


@pytest.mark.parametrize("kind", ["generate", "list", "stream", "score", "embed", "chat", "agenerate"])
def test_the_wait_in_the_queue_counts_for_the_timeout(kind: str, engine: Engine, busy: TokenStream) -> None:
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: engine.generate("b", SHORT, timeout=0.05),
        "list": lambda: engine.generate(PROMPTS, SHORT, timeout=0.05),  # most of it waits for room
        "stream": lambda: list(engine.stream("b", SHORT, timeout=0.05)),
        "score": lambda: engine.score("b", timeout=0.05),
        "embed": lambda: engine.embed(["b"], timeout=0.05),
        "chat": lambda: engine.chat(QUESTION, SHORT, template=CHATML, timeout=0.05),
        "agenerate": lambda: asyncio.run(engine.agenerate(PROMPTS[:2], SHORT, timeout=0.05)),
    }
    # A later one of several has what is left of the call's timeout.
    with pytest.raises(RequestTimeoutError, match=r"within (its|the) timeout of 0\.0[45]\d* s"):
        calls[kind]()
    assert_still_busy(engine, busy)


def test_requests_are_served_in_the_order_of_their_arrival(engine: Engine, busy: TokenStream) -> None:
    first, second = engine.stream(["b", "c"], SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
    busy.close()
    assert len(list(itertools.islice(first, 1))) == 1
    assert waiting(engine) == 1
    assert len(list(second)) == 200
    assert len(list(first)) == 199
