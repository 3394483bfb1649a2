"""The HTTP server as a deployment of Ray Serve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_moe._placements import parse_placement
from llama_moe.errors import InvalidOptionError
from llama_moe.server import ServerSettings, create_app

from .resources import require, threads_of_actor

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application, Deployment

_TYPES = {item.name: str(item.type) for item in fields(ServerSettings)}


def deployment(settings: ServerSettings) -> Deployment:
    """A deployment of Ray Serve, named "LlamaMoeServer", each replica of which is a server with models of its own.

    Args:
        settings: as for `llama_moe.server.create_app`. Files and folders are those of the machine of a replica. Where `threads` is None, it
            is the number of CPUs that Ray reserves for a replica, within its share of the machine's cores; where it is a number, as many
            are reserved. Ray Serve listens on its own address, not on that of `bind`.

    Returns:
        The deployment. Its `options()` set the number of replicas and the resources of each, and its `bind()` makes an application of it.

    Raises:
        ImportError: Ray Serve is not installed.

    Example:
        serve.run(deployment(ServerSettings(models=["/models/model.gguf"])).options(num_replicas=2).bind())
    """
    serve = require("ray.serve", "llama_moe.ray.deployment")

    started: list[FastAPI] = []

    class LlamaMoeServer:
        """A replica. What it answers is the application's; this starts it."""

        async def __init__(self) -> None:  # type: ignore[misc] # Ray Serve awaits it
            # Only in the replica is it known what Ray gave to it.
            own_threads = settings.threads is None and settings.profile is None
            app = create_app(replace(settings, threads=threads_of_actor()) if own_threads else settings)
            # Not left to the application's start: of what is wrong there, Ray says no more than that it failed.
            await app.state.server.pool.start()
            started.append(app)

    def the_started_app() -> FastAPI:
        return started.pop()

    made: Deployment = serve.deployment(
        serve.ingress(the_started_app)(LlamaMoeServer),
        name="LlamaMoeServer",
        # The engine has a queue of its own, and refuses what it has no room for.
        max_ongoing_requests=settings.parallel + settings.max_queue + 1,
        graceful_shutdown_timeout_s=settings.grace_seconds,
        ray_actor_options={} if settings.threads is None else {"num_cpus": settings.threads},
    )
    return made


def build_app(args: Mapping[str, Any]) -> Application:
    """An application for `serve run` and for the configuration files of Ray Serve.

    Args:
        args: fields of `ServerSettings` by name. Each may be text, as the command line gives it: numbers, "null", words for placements such
            as "cpu", "first:12" and "fit:8GiB", and several files with commas between them. `api_key_file` in place of `api_key` names a
            file that has the key.

    Raises:
        ImportError: Ray Serve is not installed.
        InvalidOptionError: there is no such field, or a value is outside its range.
        TypeError: a value has the wrong type.

    Example:
        serve run llama_moe.ray:build_app models=/models/model.gguf experts=cpu parallel=8
    """
    return deployment(settings_of(args)).bind()


def settings_of(args: Mapping[str, Any]) -> ServerSettings:
    """See `build_app`."""
    values = dict(args)
    key_file = values.pop("api_key_file", None)
    for name in values:
        if name not in _TYPES:
            raise InvalidOptionError(f"there is no setting {name!r}; there are {', '.join([*_TYPES, 'api_key_file'])}")
    if key_file is not None:
        if values.get("api_key") is not None:
            raise InvalidOptionError("api_key and api_key_file are both given; give one of them")
        values["api_key"] = Path(key_file).read_text(encoding="utf-8").strip()
    return ServerSettings(**{name: _value(name, value) for name, value in values.items()})


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if name == "experts":
        return parse_placement(value)
    kinds = _TYPES[name].split(" | ")
    if kinds[0].startswith("Sequence"):
        return value.split(",")
    if {"int", "float", "bool", "None"} & set(kinds) and name != "api_key":
        try:
            parsed = json.loads(value)
        except ValueError:
            return value  # such as a size
        return value if isinstance(parsed, str | list | dict) else parsed
    return value
