"""llama.cpp's log goes to Python's logging, and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llama_moe import Engine, Model, SamplingParams
from llama_moe.errors import ModelLoadError
from tests.support.processes import run_python
from tests.support.waiting import eventually

LOGGER = "llama_moe"


def use_it(path: Path) -> None:
    with Model(path, experts="gpu", devices=[]) as model, Engine(model, context_size=256, threads=1) as engine:
        engine.generate("Hello", SamplingParams(max_tokens=2, temperature=0))


@pytest.fixture
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


@pytest.fixture(autouse=True)
def level_is_restored() -> Iterator[None]:
    logger = logging.getLogger(LOGGER)
    level, disabled = logger.level, logger.disabled
    yield
    logger.setLevel(level)
    logger.disabled = disabled


def test_nothing_is_written_to_the_terminal(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger(LOGGER).setLevel(logging.DEBUG)
    use_it(path)
    assert capfd.readouterr() == ("", "")


def test_a_process_that_configures_nothing_writes_nothing(path: Path) -> None:
    done = run_python(
        """
        import sys, llama_moe
        with llama_moe.load(sys.argv[1], experts="gpu", devices=[], context_size=256, threads=1) as llm:
            llm.generate("Hello", llama_moe.SamplingParams(max_tokens=2))
        try:
            llama_moe.load(__file__ if "__file__" in globals() else sys.executable)
        except llama_moe.errors.ModelLoadError:
            pass
        """,
        path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING, logging.CRITICAL])
def test_records_have_the_level_of_their_line(level: int, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(level, logger=LOGGER):
        use_it(path)
    records = [record for record in caplog.records if record.name == LOGGER]
    assert all(record.levelno >= level for record in records)
    assert any(record.levelno == logging.INFO for record in records) == (level <= logging.INFO)
    if level <= logging.INFO:
        assert any("load_tensors" in record.getMessage() for record in records)
        assert not any("\n" in record.getMessage() for record in records)


def test_a_line_with_a_percent_sign_is_not_a_format(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=LOGGER):
        use_it(path)
    for record in caplog.records:
        assert record.getMessage() == str(record.args[0] if isinstance(record.args, tuple) and record.args else record.msg)


def test_the_level_can_change_at_any_time(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.ERROR)
    use_it(path)
    assert [record for record in caplog.records if record.name == LOGGER and record.levelno < logging.ERROR] == []
    logger.setLevel(logging.INFO)
    use_it(path)
    assert any(record.name == LOGGER for record in caplog.records)


def test_an_error_is_logged_before_it_is_raised(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:1000])
    with caplog.at_level(logging.ERROR, logger=LOGGER), pytest.raises(ModelLoadError):
        Model(broken, devices=[])
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_a_handler_that_fails_does_not_break_the_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            self.handleError(record)

    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger, handler = logging.getLogger(LOGGER), Failing()
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.DEBUG)
        use_it(path)
    finally:
        logger.removeHandler(handler)


def test_a_prompt_that_is_cancelled_logs_no_error(demo_model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(demo_model, context_size=2048, threads=1) as engine:
        stream = engine.stream(list(range(500, 2500)), SamplingParams(max_tokens=4, temperature=0))
        assert eventually(lambda: engine.stats()["requests_running"] == 1)
        stream.close()
        engine.generate([500], SamplingParams(max_tokens=2, temperature=0))
        assert engine.stats()["prompt_tokens"] < 2000  # it was stopped, not computed
    assert [record.getMessage() for record in caplog.records if record.name == LOGGER and record.levelno >= logging.WARNING] == []
