"""A sweep tries options in processes of their own, keeps what it found, and what it found is what a load uses."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import llama_moe
from llama_moe import Device, ExpertPlacement, LoraAdapter, Profile, TunedOptions
from llama_moe._placements import parse_placement, placement_name
from llama_moe.errors import InvalidOptionError, LlamaMoeError, PlacementError
from llama_moe.profiles import model_fingerprint, profile_key
from llama_moe.trials import OutOfTime, Trial, TrialTask, run_trial
from llama_moe.tuning import TuningProgress
from llama_moe.tuning_space import Space
from llama_moe.worker import Worker
from tests.support.lora_files import weights_of, write_lora
from tests.support.tiny_models import write_tiny_model
from tests.support.waiting import eventually

if TYPE_CHECKING:
    from llama_moe.lora import LoraLike

QUICK: dict[str, Any] = {
    "minutes": 30,
    "context_size": 256,
    "prompt_tokens": 8,
    "generate_tokens": 4,
    "repetitions": 1,
}


@pytest.fixture
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_MOE_CACHE", str(tmp_path / "cache"))
    # Threads that spin while they wait make a sweep slow when others use the same cores.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return tmp_path / "cache" / "profiles"


def task(path: Path) -> TrialTask:
    return TrialTask(
        path=str(path),
        rpc=(),
        devices=(),
        lora=(),
        context_size=256,
        max_sequences=1,
        prompt_tokens=8,
        generate_tokens=4,
        repetitions=1,
        seconds=20,
    )


def keep(path: Path, options: TunedOptions, *, lora: LoraLike = ()) -> Profile:
    """Keeps a profile as a sweep without an accelerator does."""
    key = profile_key(path, accelerators=[], context_size=256, max_sequences=1, lora=lora)
    profile = Profile(
        key=key,
        options=options,
        objective="decode",
        prompt_tokens_per_second=2,
        decode_tokens_per_second=1,
        gain=None,
        model=path.name,
        version="0",
    )
    profile.write()
    return profile


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "llama_moe._trial_process" in child.cmdline()]


def test_a_sweep_keeps_the_best_and_a_second_one_has_nothing_to_do(path: Path, folder: Path) -> None:
    started: list[TuningProgress] = []
    report = llama_moe.tune(path, devices=(), on_progress=started.append, **QUICK)
    assert report.in_time
    assert not children()
    tried = {trial.options for trial in report.trials}
    assert TunedOptions() in tried
    assert replace(TunedOptions(), repack=False) in tried
    assert replace(TunedOptions(), expert_kernels="ggml") in tried
    assert len(started) == len(report.trials)
    assert all(0 <= now.share <= 1 for now in started)
    # One option at a time: each differs from some earlier one in one way, threads of both kinds counted as one.
    assert all(trial.error is None for trial in report.trials)
    assert all(trial.decode_tokens_per_second > 0 and trial.prompt_tokens_per_second > 0 for trial in report.trials)
    # Those that decide were measured three times, in turn.
    finals = [(trial.round, trial.options) for trial in report.trials if trial.round > 0]
    assert [number for number, _ in finals] == sorted(number for number, _ in finals)
    assert {number for number, _ in finals} == {1, 2}
    assert TunedOptions() in {options for _, options in finals}
    assert report.winner.options in {options for _, options in finals}

    stored = Profile.read(report.path)
    assert stored == report.profile
    assert Path(report.path).parent == folder
    assert stored.options == report.winner.options
    assert stored.gain is not None
    assert stored.gain > 0.98

    again = llama_moe.tune(path, devices=(), on_progress=lambda _: pytest.fail("a trial was repeated"), **QUICK)
    assert again.trials == report.trials
    assert again.winner == report.winner
    json.dumps(again.to_dict())
    assert "kept in" in str(again)


def test_trials_are_for_what_they_measured(path: Path, tmp_path: Path) -> None:
    first = llama_moe.tune(path, devices=(), **QUICK)
    # A copy of the file is the same model; other lengths, and a restart, are other trials.
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert llama_moe.tune(copy, devices=(), on_progress=lambda _: pytest.fail("a trial was repeated"), **QUICK).trials == first.trials
    for change in ({"prompt_tokens": 9}, {"restart": True}, {"max_sequences": 2}):
        with pytest.raises(KeyboardInterrupt):
            llama_moe.tune(path, devices=(), on_progress=interrupt, **{**QUICK, **change})
        assert not children()


def interrupt(_: TuningProgress) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_sweep_goes_on(path: Path) -> None:
    def stop_at_the_third(now: TuningProgress) -> None:
        if now.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llama_moe.tune(path, devices=(), on_progress=stop_at_the_third, **QUICK)
    numbers: list[int] = []
    report = llama_moe.tune(path, devices=(), on_progress=lambda now: numbers.append(now.number), **QUICK)
    assert numbers == list(range(3, len(report.trials) + 1))


def test_a_trial_that_dies_is_one_failed_trial(path: Path) -> None:
    def kill_the_second(now: TuningProgress) -> None:
        if now.number == 2:
            (child,) = children()
            child.kill()

    report = llama_moe.tune(path, devices=(), on_progress=kill_the_second, **QUICK)
    (dead,) = [trial for trial in report.trials if trial.error is not None]
    assert dead is report.trials[1]
    assert "killed" in (dead.error or "")
    assert len(report.trials) > 4
    assert report.winner.options != dead.options
    assert "failed: " in str(report)


def test_a_trial_that_is_too_slow_fails_and_one_at_the_end_is_no_trial(path: Path) -> None:
    far = time.monotonic() + 1000
    slow = run_trial(task(path), TunedOptions(), limit=0, deadline=far)
    assert slow.error == "it took longer than 0 s"
    with pytest.raises(OutOfTime):
        run_trial(task(path), TunedOptions(), limit=1000, deadline=time.monotonic())
    with pytest.raises(OutOfTime):
        run_trial(task(path), TunedOptions(), limit=1000, deadline=time.monotonic() + 0.05)
    assert not children()


def test_a_sweep_without_time_says_so_and_keeps_no_profile(path: Path, folder: Path) -> None:
    with pytest.raises(LlamaMoeError, match="more minutes"):
        llama_moe.tune(path, devices=(), **{**QUICK, "minutes": 0.0005})
    assert not children()
    assert not list(folder.glob("*"))


def test_a_sweep_in_which_nothing_works_says_why_and_begins_anew(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    content = bytearray(path.read_bytes())
    # The vocabulary's merges are named otherwise: the header can be read, the model cannot be loaded.
    at = content.index(b"tokenizer.ggml.model")
    content[at : at + 20] = b"tokenizer.ggml.mold_"
    broken.write_bytes(content)
    for _ in range(2):
        started: list[TuningProgress] = []
        with pytest.raises(LlamaMoeError, match="no options worked"):
            llama_moe.tune(broken, devices=(), on_progress=started.append, **QUICK)
        assert started


def test_with_an_accelerator_the_experts_move_within_the_memory_that_is_allowed(path: Path, worker: Worker) -> None:
    layers = llama_moe.inspect(path).layer_count
    report = llama_moe.tune(path, rpc=[worker.endpoint], **QUICK)
    sizes = {trial.options.experts: sum(trial.device_bytes.values()) for trial in report.trials}
    assert {"fit", f"first:{layers}"} <= set(sizes)
    assert 0 < sizes[f"first:{layers}"] < sizes["fit"]
    assert report.profile.key.accelerators == (f"RPC:{worker.endpoint}",)
    # It is for loads with this accelerator.
    assert report.path != str(profile_key(path, accelerators=[], context_size=256, max_sequences=1).path)

    most = (min(sizes.values()) + max(sizes.values())) // 2
    limited = llama_moe.tune(path, rpc=[worker.endpoint], vram=most, **QUICK)
    assert sum(limited.winner.device_bytes.values()) <= most < max(sizes.values())


def test_loading_with_the_profile(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = TunedOptions(experts="gpu", micro_batch_size=128, threads=1, threads_batch=2, repack=False, host_memory="pageable")
    profile = keep(path, options)

    def loaded(**given: Any) -> tuple[int, int, int]:
        with llama_moe.load(path, **{"devices": [], "context_size": 256, **given}) as llm:
            return llm.micro_batch_size, llm.threads, llm.threads_batch

    with caplog.at_level(logging.INFO, "llama_moe"):
        assert loaded(profile="auto") == (128, 1, 2)
    used = "experts='gpu', micro_batch_size=128, threads=1, threads_batch=2, repack=False, expert_kernels='auto', host_memory='pageable'"
    assert f"used of it: {used}" in caplog.text
    assert loaded(profile=profile.key.path) == (128, 1, 2)
    # What is given stays, also where it is the default.
    assert loaded(profile="auto", micro_batch_size=64, threads_batch=None) == (64, 1, 1)
    for given in ({}, {"profile": None}, {"profile": "none"}, {"profile": "auto", "context_size": 512}):
        assert loaded(threads=2, **given)[::2] == (256 if given.get("context_size", 256) == 256 else 512, 2)


def test_with_adapters(path: Path, tmp_path: Path) -> None:
    adapter, other = tmp_path / "adapter.gguf", tmp_path / "other.gguf"
    write_lora(adapter, weights_of(path, containing=("attn_q.",)), architecture="qwen3moe")
    write_lora(other, weights_of(path, containing=("attn_q.",)), architecture="llama")

    # The trials load them, and measure again what was measured without, but not for another scale.
    without = llama_moe.tune(path, devices=(), **QUICK)
    started: list[TuningProgress] = []
    report = llama_moe.tune(path, devices=(), lora=adapter, on_progress=started.append, **QUICK)
    assert len(started) == len(report.trials)
    half = llama_moe.tune(
        path, devices=(), lora=LoraAdapter(adapter, 0.5), on_progress=lambda _: pytest.fail("a trial was repeated"), **QUICK
    )
    assert half.trials == report.trials
    assert llama_moe.tune(path, devices=(), lora=LoraAdapter(adapter, 0), **QUICK).trials == without.trials
    with pytest.raises(LlamaMoeError, match="is an adapter for a model of the architecture 'llama'"):
        llama_moe.tune(path, devices=(), lora=other, **QUICK)

    # A profile is for loads with the same ones.
    keep(path, TunedOptions(micro_batch_size=64, threads=1))
    keep(path, TunedOptions(micro_batch_size=128, threads=1), lora=adapter)
    for lora, size in (((), 64), (adapter, 128), (LoraAdapter(adapter, 0), 64), ([adapter, adapter], 256)):
        with llama_moe.load(path, devices=[], context_size=256, lora=lora, profile="auto") as llm:
            assert llm.micro_batch_size == size


def test_without_a_profile_the_defaults_are_used_and_said_so(path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load() -> None:
        llama_moe.load(path, devices=[], context_size=256, threads=1, profile="auto").close()

    with caplog.at_level(logging.INFO, "llama_moe"):
        load()
    assert sum("no profile of this model" in record.getMessage() for record in caplog.records) == 1
    # A damaged one is worth a warning, and no error.
    damaged = keep(path, TunedOptions()).key.path
    for text in ("", "[]", "{}", damaged.read_text(encoding="utf-8").replace('"fit"', '"anywhere"')):
        damaged.write_text(text, encoding="utf-8")
        caplog.clear()
        load()
        assert [record.levelname for record in caplog.records if "no profile" in record.getMessage()] == ["WARNING"], text


def test_a_profile_that_is_named_must_be_there_and_of_this_model(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        llama_moe.load(path, devices=[], profile=tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("text", encoding="utf-8")
    with pytest.raises(InvalidOptionError, match=r"text\.json is no profile"):
        llama_moe.load(path, devices=[], profile=tmp_path / "text.json")
    other = write_tiny_model(tmp_path / "other.gguf", "llama")
    with pytest.raises(InvalidOptionError, match=r"of another model.*other\.gguf"):
        llama_moe.load(path, devices=[], profile=keep(other, TunedOptions()).key.path)
    with pytest.raises(FileNotFoundError):
        llama_moe.load(tmp_path / "missing.gguf", devices=[], profile="auto")


def test_a_model_is_known_by_its_header(path: Path, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    same = write_tiny_model(tmp_path / "renamed.gguf", "qwen3moe", seed=9)  # other weights of the same kind are as quick
    prints = [model_fingerprint(llama_moe.inspect(file)) for file in (path, same, tiny_model("llama"))]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experts", "somewhere"),
        ("experts", 3),
        ("micro_batch_size", 0),
        ("micro_batch_size", True),
        ("threads", "2"),
        ("threads_batch", -1),
        ("repack", 1),
        ("expert_kernels", "fast"),
        ("host_memory", "paper"),
    ],
)
def test_options_of_a_file_are_checked(name: str, value: object) -> None:
    fine = {
        "experts": "first:3",
        "micro_batch_size": 64,
        "threads": None,
        "threads_batch": 2,
        "repack": False,
        "expert_kernels": "ggml",
        "host_memory": "mmap",
    }
    assert TunedOptions.from_dict(fine).experts == "first:3"
    with pytest.raises((InvalidOptionError, PlacementError)):
        TunedOptions.from_dict({**fine, name: value})
    with pytest.raises(InvalidOptionError):
        TunedOptions.from_dict({key: fine[key] for key in fine if key != name})


def test_placements_as_words() -> None:
    words = {
        "gpu": ExpertPlacement.gpu(),
        "cpu": ExpertPlacement.cpu(),
        "fit": ExpertPlacement.fit(),
        "first:3": ExpertPlacement.cpu_first(3),
        "last:0": ExpertPlacement.cpu_last(0),
        "fit:8.00GiB": ExpertPlacement.fit(vram="8GiB"),
        "fit:123456789B": ExpertPlacement.fit(vram=123456789),
    }
    for word, placement in words.items():
        assert parse_placement(word) == placement
        assert placement_name(placement) == word
    for wrong in ("", "first", "first:", "first:-1", "first:x", "middle:3", "fits", "GPU"):
        with pytest.raises(PlacementError, match="expected"):
            parse_placement(wrong)


def test_wrong_numbers_are_refused(path: Path) -> None:
    for options, message in (
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"objective": "sleep"}, "'sleep'"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"context_size": 4}, "context_size is 4"),
        ({"max_sequences": 0}, "max_sequences"),
        ({"vram": "little"}, "'little'"),
    ):
        with pytest.raises(InvalidOptionError, match=message):
            llama_moe.tune(path, devices=(), **{**QUICK, **options})
    with pytest.raises(PlacementError, match="no device 'CUDA7'"):
        llama_moe.tune(path, devices="CUDA7", on_progress=lambda _: pytest.fail("a trial was begun"), **QUICK)


def test_devices_are_chosen_as_for_a_load(path: Path, worker: Worker, accelerator: Device) -> None:
    with pytest.raises(InvalidOptionError, match=f"devices has '{accelerator.name}', .* not in rpc"):
        llama_moe.tune(path, devices=accelerator, on_progress=lambda _: pytest.fail("a trial was begun"), **QUICK)
    reports = [
        llama_moe.tune(path, devices=chosen, rpc=[worker.endpoint], **QUICK)
        for chosen in (accelerator, accelerator.name.lower(), [accelerator], (worker.endpoint, "CPU"))
    ]
    assert all(report.trials == reports[0].trials for report in reports)
    assert all(trial.error is None for trial in reports[0].trials)
    assert reports[0].profile.key.accelerators == (f"RPC:{worker.endpoint}",)


def test_one_option_set_that_works_wins_though_the_defaults_fail(path: Path, worker: Worker) -> None:
    def kill_all_but_the_second(now: TuningProgress) -> None:
        if now.number != 2:
            assert eventually(lambda: len(children()) == 1)
            children()[0].kill()

    report = llama_moe.tune(path, rpc=[worker.endpoint], on_progress=kill_all_but_the_second, **QUICK)
    assert [trial.error is None for trial in report.trials[:3]] == [False, True, False]
    assert report.winner.options == report.trials[1].options
    assert report.profile.gain is None


def test_layers_that_fit_are_counted_as_a_placement_counts_them(tiny_model: Callable[[str], Path], accelerator: Device) -> None:
    path = tiny_model("deepseek2")  # its first layer has no experts
    needed = llama_moe.plan(path, experts=ExpertPlacement.cpu_first(2), context_size=256, devices=accelerator)
    vram = needed.memory.by_device()[accelerator.name]
    reserve = ExpertPlacement.fit().reserve
    default = TunedOptions(experts=placement_name(ExpertPlacement.fit(vram=vram + reserve)))
    space = Space(llama_moe.inspect(path), task(path), [accelerator], vram=vram, default=default)
    assert space.layers_that_fit() == 2
    assert space.may_fit(2)
    assert not space.may_fit(0)
    unlimited = Space(llama_moe.inspect(path), task(path), [accelerator], vram=None, default=TunedOptions())
    assert [unlimited.may_fit(count) for count in range(4)] == [True, False, True, True]


def test_a_trial_says_what_its_load_said(path: Path) -> None:
    trial = run_trial(task(path), TunedOptions(experts="first:99"), limit=1000, deadline=time.monotonic() + 1000)
    assert isinstance(trial, Trial)
    assert "99" in (trial.error or "")
    assert trial.decode_tokens_per_second == 0
