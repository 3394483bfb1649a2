"""The options of the C++ core and those of the package are the same, with the same defaults."""

from __future__ import annotations

import inspect
from dataclasses import asdict

import llama_moe
from llama_moe import Context, Engine, Model, Speculative, _core
from llama_moe._options import option_value
from llama_moe.profiles import TunedOptions
from llama_moe.speculative import speculation_options


def native_defaults(options: object) -> dict[str, object]:
    return {name: getattr(options, name) for name in dir(options) if not name.startswith("_") and not callable(getattr(options, name))}


def keyword_defaults(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def same(ours: object, native: object) -> bool:
    if isinstance(ours, tuple):
        ours = list(ours)
    if isinstance(native, float):
        return isinstance(ours, int | float) and abs(ours - native) < 1e-6
    return ours == native


def test_context_and_engine() -> None:
    speculation = {"draft_tokens", "draft_ngram", "draft_min_probability"}
    for cls, options, beside in ((Context, _core.ContextOptions(), set()), (Engine, _core.EngineOptions(), speculation)):
        native = native_defaults(options)
        ours = keyword_defaults(cls)
        assert set(ours) - {"speculative"} == set(native) - beside
        for name, value in ours.items():
            # None is 0 in the core: "as many as there are", "as the other".
            assert name == "speculative" or same(0 if value is None else value, native[name]), name


def test_speculation(model: Model) -> None:
    native = native_defaults(_core.EngineOptions())
    keys = {name for name in native if name.startswith("draft_")}
    assert keys == {"draft_tokens", "draft_ngram", "draft_min_probability"}
    # Off: what the core does by itself.
    assert speculation_options(None) == {}
    assert (native["draft_tokens"], native["draft_ngram"]) == (0, 0)
    assert speculation_options(Speculative.lookup()) == {"draft_tokens": 8, "draft_ngram": 3, "draft_min_probability": 0.0}
    assert speculation_options(Speculative.draft(model)) == {"draft_tokens": 4, "draft_ngram": 0, "draft_min_probability": 0.5}
    assert keyword_defaults(Speculative.draft) == {"draft_tokens": 4, "min_probability": 0.5}


def test_model() -> None:
    native = native_defaults(_core.ModelOptions())
    ours = keyword_defaults(Model)
    assert set(native) - {"hypothetical_devices", "fit_for"} <= set(ours)  # of plans, and what `load` knows from its engine
    for name in ("host_memory", "repack", "check_tensors", "devices"):
        assert ours[name] == native[name], name
    assert (ours["gpu_layers"], native["gpu_layers"]) == ("all", -1)


def test_load_takes_what_the_model_and_the_engine_take() -> None:
    ours = {name: option_value(default) for name, default in keyword_defaults(llama_moe.load).items()}
    assert ours.pop("profile") is None
    both = keyword_defaults(Model) | keyword_defaults(Engine)
    del both["fit_context_tokens"]  # load knows it from the context
    assert ours == both


def test_a_model_of_the_hub_takes_what_a_model_and_a_download_take() -> None:
    download = keyword_defaults(llama_moe.pull) | {"on_download": None}
    del download["folder"], download["on_progress"]  # it goes to the cache; on_progress is of the load
    assert keyword_defaults(Model.from_hub) == keyword_defaults(Model) | download


def test_what_tuning_starts_from_are_the_defaults() -> None:
    ours = {name: option_value(default) for name, default in keyword_defaults(llama_moe.load).items()}
    for name, value in asdict(TunedOptions()).items():
        assert ours[name] == value
