"""A file that cannot be loaded, or memory that is not there, is an exception that says why; the process goes on."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import psutil
import pytest
from gguf import GGUFValueType

import llama_moe
from llama_moe import Context, Engine, Model, SamplingParams, _core
from llama_moe.errors import DecodeError, DoesNotFitError, InvalidOptionError, LlamaMoeError, ModelLoadError
from tests.support.gguf_files import Value, edited_copy, sparse_copy
from tests.support.processes import run_python

Paths = Callable[[str], Path]
NAME = "qwen3moe"


def load(path: Path) -> Model:
    return Model(path, experts="gpu", devices=[])


def generate_with(path: Path) -> int:
    with load(path) as model, Engine(model, context_size=256, threads=1) as engine:
        return len(engine.generate("Hello", SamplingParams(max_tokens=3, temperature=0)).tokens)


@pytest.fixture(autouse=True)
def the_process_goes_on(tiny_model: Paths, model: Model) -> Iterator[None]:
    """After each failure a good model loads and generates, and nothing of the failed one is left."""
    before = _core.live_objects()
    yield
    assert generate_with(tiny_model(NAME)) == 3
    gc.collect()
    assert _core.live_objects() == before


# ---- files


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: '.*missing\.gguf'"):
        load(tmp_path / "missing.gguf")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"'{tmp_path}' is a directory; a GGUF file is needed"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGML" * 100, b"#!/bin/sh\necho hello\n", b"\0" * 4096])
def test_a_file_of_another_kind(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"'.*other\.gguf' is not a GGUF file: it does not start with the magic \"GGUF\""):
        load(path)


@pytest.mark.parametrize("version", [0, 99, 3 << 24])
def test_another_version_of_gguf(version: int, tiny_model: Paths, tmp_path: Path) -> None:
    path = tmp_path / "version.gguf"
    content = bytearray(tiny_model(NAME).read_bytes())
    content[4:8] = version.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"version\.gguf' has a corrupted or truncated GGUF header: .*version"):
        load(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_header(share: float, tiny_model: Paths, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    header = int(gguf.GGUFReader(tiny_model(NAME)).data_offset)
    path.write_bytes(tiny_model(NAME).read_bytes()[: max(5, int(header * share))])
    with pytest.raises(ModelLoadError, match=r"short\.gguf' has a corrupted or truncated GGUF header"):
        load(path)
    with pytest.raises(ModelLoadError):
        llama_moe.inspect(path)


@pytest.mark.parametrize("missing", [1, 1000, 100_000])
def test_truncated_weights(missing: int, tiny_model: Paths, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    content = tiny_model(NAME).read_bytes()
    path.write_bytes(content[:-missing])
    with pytest.raises(
        ModelLoadError, match=rf"is truncated: tensor '[a-z0-9_.]+' ends at byte \d+, the file has {len(content) - missing}"
    ):
        load(path)


def test_a_file_that_is_not_a_model(tmp_path: Path, tiny_model: Paths) -> None:
    path = edited_copy(tiny_model(NAME), tmp_path / "data.gguf", without=["general.architecture"])
    with pytest.raises(ModelLoadError, match=r"data\.gguf' has no general\.architecture; it is not a model"):
        load(path)


def test_a_corrupted_header_is_never_more_than_an_exception(tiny_model: Paths, tmp_path: Path) -> None:
    path = tmp_path / "corrupted.gguf"
    content = tiny_model(NAME).read_bytes()
    header = int(gguf.GGUFReader(tiny_model(NAME)).data_offset)
    generator = random.Random(1)
    refused = 0
    for _ in range(150):
        corrupted = bytearray(content)
        for _ in range(generator.choice([1, 2, 8])):
            corrupted[generator.randrange(4, header)] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        path.write_bytes(corrupted)
        try:
            with load(path) as model, Context(model, context_size=256, threads=1) as context:
                context.decode([1, 2, 3])
        except LlamaMoeError:
            refused += 1
    assert refused > 20


# ---- headers that do not describe a model


UINT32, STRING, FLOAT32 = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.FLOAT32


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": ("mamba9", STRING)}, r"unknown model architecture: 'mamba9'"),
        ({"qwen3moe.block_count": ("four", STRING)}, r"qwen3moe\.block_count"),
        ({"qwen3moe.embedding_length": ("wide", STRING)}, r"qwen3moe\.embedding_length"),
        ({"qwen3moe.block_count": (5, UINT32)}, r"blk\.4\..*not found"),
        ({"qwen3moe.block_count": (3, UINT32)}, r"wrong number of tensors"),
        ({"qwen3moe.block_count": (100_000, UINT32)}, r"qwen3moe\.block_count is 100000; it must be from 0 to \d+"),
        ({"qwen3moe.embedding_length": (128, UINT32)}, r"token_embd\.weight' has wrong shape; expected +128"),
        ({"qwen3moe.expert_count": (4, UINT32)}, r"ffn_gate_inp\.weight' has wrong shape"),
        ({"qwen3moe.expert_count": (1 << 20, UINT32)}, r"qwen3moe\.expert_count is 1048576; it must be from 0 to \d+"),
        ({"qwen3moe.attention.head_count": (0, UINT32)}, r"qwen3moe\.attention\.head_count is 0; it must be 1 or more"),
        ({"tokenizer.ggml.model": ("runes", STRING)}, r"unknown tokenizer: 'runes'"),
    ],
)
def test_a_header_that_contradicts_itself(metadata: Mapping[str, Value], message: str, tiny_model: Paths, tmp_path: Path) -> None:
    path = edited_copy(tiny_model(NAME), tmp_path / "wrong.gguf", metadata=metadata)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(path)
    assert "wrong.gguf" in str(caught.value)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "context_length", "attention.layer_norm_rms_epsilon"])
def test_a_header_without_a_value_it_needs(key: str, tiny_model: Paths, tmp_path: Path) -> None:
    path = edited_copy(tiny_model(NAME), tmp_path / "lacking.gguf", without=[f"{NAME}.{key}"])
    with pytest.raises(ModelLoadError, match=key.replace(".", r"\.")):
        load(path)


@pytest.mark.parametrize("name", ["blk.2.ffn_up_exps.weight", "blk.0.attn_q.weight", "output_norm.weight"])
def test_a_model_without_a_tensor_it_needs(name: str, tiny_model: Paths, tmp_path: Path) -> None:
    path = edited_copy(tiny_model(NAME), tmp_path / "lacking.gguf", without_tensors=[name])
    with pytest.raises(ModelLoadError, match=rf"{name}' not found"):
        load(path)


def test_numbers_that_check_tensors_finds(tiny_model: Paths, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    content = bytearray(tiny_model(NAME).read_bytes())
    tensor = next(tensor for tensor in gguf.GGUFReader(tiny_model(NAME)).tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    content[tensor.data_offset : tensor.data_offset + 2] = b"\xff\x7f"  # NaN as F16
    path.write_bytes(content)
    load(path).close()
    with pytest.raises(ModelLoadError, match=r"blk\.1\.ffn_up_exps\.weight"):
        Model(path, experts="gpu", devices=[], check_tensors=True)


# ---- where llama.cpp itself would end the process


def test_an_assertion_in_llama_cpps_loader(tiny_model: Paths, tmp_path: Path) -> None:
    path = edited_copy(tiny_model(NAME), tmp_path / "wrong.gguf", metadata={"qwen3moe.expert_count": (0, UINT32)})
    with pytest.raises(ModelLoadError, match=r"wrong\.gguf.*GGML_ASSERT\(.*n_expert.*\) failed"):
        load(path)


def test_an_assertion_in_a_computation(tiny_model: Paths, tmp_path: Path) -> None:
    path = edited_copy(tiny_model(NAME), tmp_path / "wrong.gguf", metadata={"qwen3moe.attention.layer_norm_rms_epsilon": (-1.0, FLOAT32)})
    with load(path) as model:
        with Context(model, context_size=256, threads=1) as context:
            with pytest.raises(DecodeError, match=r"the context is lost: .*GGML_ASSERT\(eps >= 0"):
                context.decode([1, 2, 3])
            # What was in the middle of an assertion is not used again.
            with pytest.raises(DecodeError, match="the context was lost in an earlier failure"):
                context.decode([1])
        with Engine(model, context_size=256, threads=1) as engine:
            for _ in range(2):
                with pytest.raises(DecodeError, match=r"the engine is lost: .*GGML_ASSERT\(eps >= 0"):
                    engine.generate([1, 2, 3], SamplingParams(max_tokens=1))


# ---- memory


def test_weights_larger_than_the_memory_of_this_machine(tiny_model: Paths, tmp_path: Path) -> None:
    factor = 2 * psutil.virtual_memory().total // 1_000_000  # the experts of the tiny model are about 1 MB
    path = sparse_copy(
        tiny_model("llama"), tmp_path / "huge.gguf", factor=factor, metadata={"llama.feed_forward_length": (96 * factor, UINT32)}
    )
    size = llama_moe.inspect(path).size_bytes
    assert size > psutil.virtual_memory().total
    with pytest.raises(
        DoesNotFitError, match=rf"host_memory='pageable' needs {size} bytes of host memory .*; \d+ are available; use host_memory='mmap'"
    ):
        Model(path, experts="gpu", devices=[], host_memory="pageable")
    path.unlink()


@pytest.mark.parametrize("user", [Context, Engine])
def test_a_kv_cache_larger_than_the_memory_of_this_machine(user: type[Context | Engine], model: Model) -> None:
    with pytest.raises(DoesNotFitError, match=r"a KV cache of 20000\d+ tokens needs \d+ bytes of host memory; \d+ are available"):
        user(model, context_size=2_000_000_000, threads=1)


@pytest.mark.parametrize("user", [Context, Engine])
def test_more_tokens_than_llama_cpp_can_index(user: type[Context | Engine], model: Model) -> None:
    with pytest.raises(InvalidOptionError, match=r"context_size 2000000000 times max_sequences 2 is more than llama\.cpp can index"):
        user(model, context_size=2_000_000_000, max_sequences=2, threads=1)


# An address space limited for the process in question gives what a full memory gives, without filling it.
EXHAUST_HOST = """
    import resource, sys
    import psutil
    from llama_moe import Context, Engine, Model, SamplingParams
    from llama_moe.errors import DoesNotFitError

    def failure(action, *arguments, **options):
        try:
            action(*arguments, **options)
        except DoesNotFitError as error:
            return str(error)

    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
    print(failure(Model, sys.argv[1], devices=[], host_memory="pageable", repack=False))
    resource.setrlimit(resource.RLIMIT_AS, (used + (800 << 20), resource.RLIM_INFINITY))
    with Model(sys.argv[1], devices=[], repack=False) as model:
        print(failure(Context, model, context_size=20_000, threads=1))
        print(failure(Engine, model, context_size=20_000, threads=1))
        with Engine(model, context_size=256, threads=1) as engine:
            print(len(engine.generate("Hello", SamplingParams(max_tokens=2, temperature=0)).tokens))
"""


def test_host_memory_that_runs_out(demo_path: Path) -> None:
    done = run_python(EXHAUST_HOST, demo_path)
    assert (done.returncode, done.stderr) == (0, "")
    weights, context, engine, tokens = done.stdout.splitlines()
    assert weights.startswith(f"out of memory while loading '{demo_path}': ")
    assert "failed to allocate" in weights
    for line in (context, engine):
        assert line.startswith("a context of 20224 tokens could not be made: ")
        assert line.endswith("; use a smaller context_size, fewer sequences or a quantised kv_type")
    assert tokens == "2"


EXHAUST_WORKER = """
    import resource, sys
    import psutil
    import llama_moe
    from llama_moe import Context, Engine, Model, SamplingParams
    from llama_moe.errors import DoesNotFitError
    from llama_moe.worker import Worker

    def failure(action, *arguments, **options):
        try:
            action(*arguments, **options)
        except DoesNotFitError as error:
            return str(error)

    with Worker(threads=1) as worker:
        (device,) = llama_moe.add_rpc_device(worker.endpoint)
        used = psutil.Process(worker.pid).memory_info().vms
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
        print(failure(Model, sys.argv[1], experts="gpu", devices=device))
        with Model(sys.argv[1], experts="cpu", devices=device) as model:
            print(failure(Context, model, context_size=200_000, threads=1))
            print(failure(Engine, model, context_size=200_000, threads=1))
            with Engine(model, context_size=256, threads=1) as engine:
                print(len(engine.generate("Hello", SamplingParams(max_tokens=2, temperature=0)).tokens))
        print(worker.running)
"""


def test_memory_of_an_accelerator_that_runs_out(demo_path: Path) -> None:
    done = run_python(EXHAUST_WORKER, demo_path)
    assert (done.returncode, done.stderr) == (0, "")
    weights, context, engine, tokens, running = done.stdout.splitlines()
    assert weights.startswith(f"out of memory while loading '{demo_path}': ")
    assert "failed to allocate RPC0" in weights
    for line in (context, engine):
        assert "failed to allocate RPC0" in line
        assert line.endswith("; use a smaller context_size, fewer sequences or a quantised kv_type")
    assert (tokens, running) == ("2", "True")
