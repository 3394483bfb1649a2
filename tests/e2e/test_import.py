"""What `import llama_moe` brings, and the shape of the public interface."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re

import llama_moe
from llama_moe import errors
from tests.support.processes import run_python


def documented() -> dict[str, object]:
    """What is public, without the aliases of types and the version, which can have no docstring."""
    public = {name: getattr(llama_moe, name) for name in llama_moe.__all__}
    return {name: item for name, item in public.items() if inspect.isclass(item) or inspect.isroutine(item) or inspect.ismodule(item)}


def test_importing_does_not_import_what_is_slow() -> None:
    ran = run_python("import sys, json, llama_moe; print(json.dumps(sorted(sys.modules)))")
    loaded = set(json.loads(ran.stdout))
    assert "llama_moe._core" in loaded
    assert not loaded & {"numpy", "asyncio", "typer", "rich", "importlib.metadata", "gguf", "subprocess"}
    assert ran.stderr == ""


def test_the_help_does_not_import_what_is_slow() -> None:
    ran = run_python("import sys, json, llama_moe.cli.app; print(json.dumps(sorted(sys.modules)))")
    loaded = set(json.loads(ran.stdout))
    assert "llama_moe.cli.serve" in loaded
    assert not loaded & {"numpy", "asyncio", "rich", "http.client", "ssl", "readline", "huggingface_hub", "gguf", "uvicorn", "pydantic"}
    assert not loaded & {"llama_moe.server", "llama_moe.hub", "llama_moe.worker", "llama_moe.demo_model", "llama_moe.diagnosis"}


def test_public_names_exist_and_have_docstrings() -> None:
    assert len(set(llama_moe.__all__)) == len(llama_moe.__all__)
    for name in llama_moe.__all__:
        assert getattr(llama_moe, name) is not None
    for name, public in documented().items():
        assert inspect.getdoc(public), name


def test_what_public_calls_take_and_return_is_public() -> None:
    known = {
        name
        for module in pkgutil.iter_modules(llama_moe.__path__)
        if not module.name.startswith("_")
        for name, item in vars(importlib.import_module(f"llama_moe.{module.name}")).items()
        if inspect.isclass(item) and re.match(r"llama_moe\.[a-z]", item.__module__) and not name.startswith("_")
    }
    assert known > {"Plan", "Trial"}
    public = {*llama_moe.__all__, *vars(errors)}
    for name, item in documented().items():
        members = [item, *(member for key, member in inspect.getmembers(item) if not key.startswith("_"))]
        for member in members:
            member = member.fget if isinstance(member, property) else member  # noqa: PLW2901
            annotations = {**getattr(member, "__annotations__", {})}
            for field, annotation in annotations.items():
                if not field.startswith("_"):
                    named = known & set(re.findall(r"\w+", str(annotation)))
                    assert named <= public, (name, member, field)


def test_no_public_callable_swallows_unknown_names() -> None:
    for name, public in documented().items():
        members = [public, *(member for key, member in inspect.getmembers(public) if not key.startswith("_"))]
        for member in filter(callable, members):
            try:
                signature = inspect.signature(member)
            except ValueError:
                continue  # a builtin without one
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, (name, member)
