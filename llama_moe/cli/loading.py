"""What the options of a load stand for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

import llama_moe
from llama_moe import ExpertPlacement, LoraAdapter, Model, Speculative
from llama_moe._options import Default

from .console import check_one_of, progress, regex_rules
from .pull import model_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_moe import Device, Engine
    from llama_moe.model import ExpertKernels


def choose_placement(*, cpu_moe: bool, n_cpu_moe: int | None, experts_on: Sequence[str] | None = None) -> ExpertPlacement:
    """The placement that the options stand for; more than one kind of them is a usage error."""
    check_one_of(
        "each says where the experts go",
        {"--cpu-moe": cpu_moe, "--n-cpu-moe": n_cpu_moe is not None, "--experts-on": bool(experts_on)},
    )
    if cpu_moe:
        return ExpertPlacement.cpu()
    if n_cpu_moe is not None:
        return ExpertPlacement.cpu_first(n_cpu_moe)
    return ExpertPlacement.rules(regex_rules(experts_on, "DEVICE", "--experts-on")) if experts_on else ExpertPlacement.fit()


def choose_lora(texts: Sequence[str] | None) -> list[LoraAdapter]:
    """The adapters that FILE[=SCALE] stand for; a scale that is no number is part of the file's name."""
    adapters = []
    for text in texts or ():
        file, _, number = text.rpartition("=")
        try:
            adapters.append(LoraAdapter(file, float(number)) if file and not Path(text).exists() else LoraAdapter(text))
        except ValueError:
            adapters.append(LoraAdapter(text))
    return adapters


def add_workers(endpoints: Sequence[str] | None) -> list[Device]:
    """Adds the devices of these workers to the process's, and returns them."""
    return [device for endpoint in endpoints or () for device in llama_moe.add_rpc_device(endpoint)]


def opening(
    model: Path,
    *,
    cpu_moe: bool,
    n_cpu_moe: int | None,
    experts_on: Sequence[str] | None,
    rpc: Sequence[str] | None,
    context_size: int,
    lookup: bool,
    draft_model: Path | None,
    threads: int | None,
    repack: bool | None,
    expert_kernels: str | None,
    profile: str | None,
    lora: Sequence[str] | None,
) -> contextlib.AbstractContextManager[Engine]:
    """An engine with these options; entering it loads the model, from the hub if need be, and leaving it closes all.

    Options that contradict each other are a usage error before that.
    """
    experts = choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe, experts_on=experts_on)
    check_one_of("each says what drafts tokens", {"--lookup": lookup, "--draft-model": draft_model is not None})

    @contextlib.contextmanager
    def opened() -> Iterator[Engine]:
        path = model_file(model)
        kernels = cast("ExpertKernels | None", expert_kernels)
        add_workers(rpc)
        with contextlib.ExitStack() as stack:
            speculative = Speculative.lookup() if lookup else None
            if draft_model is not None:
                with progress("Loading the draft model") as on_progress:
                    draft = Model(draft_model, repack=repack is not False, expert_kernels=kernels or "auto", on_progress=on_progress)
                speculative = Speculative.draft(stack.enter_context(draft))
            with progress("Loading") as on_progress:
                engine = llama_moe.load(
                    path,
                    experts=Default("fit") if experts == ExpertPlacement.fit() else experts,  # which no option asks for
                    context_size=context_size,
                    threads=Default(None) if threads is None else threads,
                    speculative=speculative,
                    repack=Default(True) if repack is None else repack,
                    expert_kernels=kernels or Default("auto"),
                    profile=profile,
                    lora=choose_lora(lora),
                    on_progress=on_progress,
                )
            yield stack.enter_context(engine)

    return opened()
