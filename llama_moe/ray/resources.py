"""Ray itself, and what of a machine it gave to this process."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

from llama_moe import _core

if TYPE_CHECKING:
    from collections.abc import Mapping


def require(name: str, user: str) -> Any:
    """The module of Ray by its name, such as "ray.data"; few of its functions are typed.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{user} needs Ray: pip install "llama-moe[ray]"') from error


def threads_of_actor() -> int | None:
    """CPU threads for an engine in this actor, so that the actors of one machine together do not take more than it has.

    Returns:
        One for each CPU that Ray reserved for the actor, and at most the same share of the machine's physical cores; None, the engine's own
        choice, outside an actor and where nothing was reserved.
    """
    ray = require("ray", "threads_of_actor")
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return None
    node = context.get_node_id()
    machine: dict[str, float] = next((entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node), {})
    return share_of_cores(context.get_assigned_resources(), machine, _core.usable_cores())


def share_of_cores(reserved: Mapping[str, float], machine: Mapping[str, float], cores: int) -> int | None:
    """Threads for what is reserved of a machine with `cores` physical cores.

    Ray counts logical CPUs, two of which may be one core. Where only GPUs are reserved, their share counts.
    """
    for resource in ("CPU", "GPU"):
        amount, total = reserved.get(resource, 0.0), machine.get(resource, 0.0)
        if amount > 0 and total > 0:
            share = cores * min(amount / total, 1.0)
            return max(1, math.floor(min(share, amount) if resource == "CPU" else share))
    return None
