"""LoRA adapters: the same as adding their products to the weights, on every device, and never mixed up with the model without them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import llama_moe
from llama_moe import Context, Device, DeviceSpec, ExpertPlacement, LoraAdapter, Model, SamplingParams, Speculative
from llama_moe.bandwidth import Bandwidths, DeviceRates
from llama_moe.errors import InvalidOptionError, ModelLoadError
from tests.support.lora_files import Floats, merged_copy, weights_of, write_lora
from tests.support.processes import cli
from tests.support.servers import ServerProcess
from tests.support.tiny_models import MODELS

if TYPE_CHECKING:
    from llama_moe.model import DevicesLike
    from llama_moe.placement import PlacementLike

PARTS = ("attn_q", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp", "output.")
TOKENS = [5, 17, 42, 99, 3, 60, 61, 7]
SCALE = 0.5
HOST = Bandwidths(machine="stated", cpu="stated", devices={"CPU": DeviceRates.stated("CPU", bytes_per_second=20e9)})


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")  # a Mixture-of-Experts model in F32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def added(path: Path, folder: Path) -> dict[str, Floats]:
    return write_lora(folder / "adapter.gguf", weights_of(path, containing=PARTS), architecture="llama")


@pytest.fixture(scope="module")
def adapter(folder: Path, added: dict[str, Floats]) -> Path:
    return folder / "adapter.gguf"


@pytest.fixture(scope="module")
def merged(path: Path, folder: Path, added: dict[str, Floats]) -> Path:
    return merged_copy(path, folder / "merged.gguf", added, SCALE)


def logits(
    file: Path, *, lora: Sequence[LoraAdapter] = (), experts: PlacementLike = "gpu", devices: DevicesLike = (), repack: bool = False
) -> Floats:
    """Without the F16 of caches and flash attention, whose rounding would be the largest difference."""
    exact: dict[str, Any] = {"kv_type": "f32", "flash_attention": "off", "threads": 1}
    with Model(file, experts=experts, devices=devices, repack=repack, lora=lora) as model, Context(model, **exact) as context:
        return context.decode(TOKENS, outputs="all")


@pytest.fixture(scope="module")
def expected(merged: Path) -> Floats:
    return logits(merged)


def test_it_is_the_same_as_merged_weights(path: Path, adapter: Path, expected: Floats) -> None:
    with_adapter = logits(path, lora=[LoraAdapter(adapter, SCALE)])
    np.testing.assert_allclose(with_adapter, expected, atol=2e-5)
    assert np.abs(logits(path) - expected).max() > 0.05  # it makes a difference


@pytest.mark.parametrize("experts", ["gpu", "cpu", ExpertPlacement.cpu_first(1), ExpertPlacement.cpu_layers([1], projections=("down",))])
def test_under_every_placement(path: Path, adapter: Path, expected: Floats, accelerator: Device, experts: PlacementLike) -> None:
    with_adapter = logits(path, lora=[LoraAdapter(adapter, SCALE)], experts=experts, devices=accelerator)
    np.testing.assert_allclose(with_adapter, expected, atol=2e-5)


def test_with_weights_that_are_rearranged(tiny_model: Callable[[str], Path], folder: Path) -> None:
    path = tiny_model("qwen3moe")
    weights = weights_of(path, containing=("_exps", "attn_q."))
    write_lora(folder / "qwen.gguf", weights, architecture="qwen3moe")
    lora = [LoraAdapter(folder / "qwen.gguf")]
    np.testing.assert_allclose(logits(path, lora=lora, repack=True), logits(path, lora=lora), atol=0.05)


def test_several_are_added_up(path: Path, folder: Path, adapter: Path, added: dict[str, Floats]) -> None:
    other = write_lora(folder / "other.gguf", weights_of(path, containing=("attn_q",)), architecture="llama", rank=2, alpha=0, seed=1)
    both = merged_copy(
        path, folder / "both.gguf", {name: SCALE * part + -2 * other.get(name, np.float32(0)) for name, part in added.items()}, 1.0
    )
    with_both = logits(path, lora=[LoraAdapter(adapter, SCALE), LoraAdapter(folder / "other.gguf", -2)])
    np.testing.assert_allclose(with_both, logits(both), atol=2e-5)


def test_a_scale_of_zero_is_no_adapter(path: Path, adapter: Path) -> None:
    np.testing.assert_array_equal(logits(path, lora=[LoraAdapter(adapter, 0)]), logits(path))
    with Model(path, devices=[], lora=LoraAdapter(adapter, 0)) as model:
        assert "adapters" not in model.memory().by_role()


def test_a_path_alone_counts_once(path: Path, adapter: Path) -> None:
    with Model(path, devices=[], lora=adapter) as model:
        assert model.lora == (LoraAdapter(str(adapter), 1.0),)
    with Model(path, devices=[], lora=[str(adapter), LoraAdapter(adapter, 2)]) as model:
        assert [each.scale for each in model.lora] == [1.0, 2.0]


# ---- memory and plans


def size_of(adapter: Path, containing: str) -> int:
    return sum(tensor.bytes for tensor in llama_moe.inspect(adapter).tensors if containing in tensor.name)


def test_memory_is_counted_where_the_weights_are(path: Path, adapter: Path, accelerator: Device) -> None:
    with Model(path, experts="cpu", devices=accelerator, lora=adapter) as model:
        rows = {(row.device, row.role): row.bytes for row in model.memory().rows}
    assert rows["CPU", "adapters"] == size_of(adapter, "_exps")
    assert rows[accelerator.name, "adapters"] == size_of(adapter, "") - size_of(adapter, "_exps")


@pytest.mark.parametrize("experts", ["gpu", "cpu"])
def test_a_plan_is_what_the_engine_reports(path: Path, adapter: Path, accelerator: Device, experts: PlacementLike) -> None:
    options = {"experts": experts, "devices": accelerator, "context_size": 512, "max_sequences": 2}
    plan = llama_moe.plan(path, lora=adapter, **options)  # type: ignore[arg-type]
    with llama_moe.load(path, lora=adapter, **options) as llm:  # type: ignore[arg-type]
        assert sorted(plan.rows) == sorted(llm.memory().rows)
        llm.generate("Hello", SamplingParams(max_tokens=4))
        assert sorted(plan.rows) == sorted(llm.memory().rows)
    without = llama_moe.plan(path, **options)  # type: ignore[arg-type]
    assert plan.memory.total_bytes >= without.memory.total_bytes + size_of(adapter, "")


def test_a_plan_for_a_gpu_that_is_not_here_counts_it_too(path: Path, adapter: Path) -> None:
    plan = llama_moe.plan(path, devices=DeviceSpec("GPU", "1GiB"), experts="cpu", lora=adapter, context_size=256)
    rows = {(row.device, row.role): row.bytes for row in plan.rows}
    assert rows["CPU", "adapters"] == size_of(adapter, "_exps")
    assert rows["GPU", "adapters"] >= size_of(adapter, "") - size_of(adapter, "_exps")


def test_predicted_speeds_count_what_it_reads(path: Path, adapter: Path) -> None:
    def read(*lora: LoraAdapter) -> dict[str, int]:
        plan = llama_moe.plan(path, devices=DeviceSpec("GPU", "1GiB"), experts="cpu", lora=lora, context_size=256)
        return dict(plan.predict(bandwidths=HOST).bytes_per_token)

    before, now = read(), read(LoraAdapter(adapter, SCALE))
    experts = size_of(adapter, "_exps")
    assert now["CPU"] - before["CPU"] == experts * MODELS["llama"].experts_used // MODELS["llama"].experts
    assert now["GPU"] - before["GPU"] == size_of(adapter, "") - experts
    assert read(LoraAdapter(adapter, 0)) == before


def test_of_an_adapter_for_an_embedding_a_row_and_a_matrix_are_read(path: Path, folder: Path) -> None:
    weights = weights_of(path, containing=("token_embd",))
    adapter = folder / "embedding.gguf"
    added = write_lora(adapter, weights, architecture="llama")
    expected = logits(merged_copy(path, folder / "embedded.gguf", added, SCALE))
    np.testing.assert_allclose(logits(path, lora=[LoraAdapter(adapter, SCALE)]), expected, atol=2e-5)
    assert np.abs(logits(path) - expected).max() > 0.05

    _, width = weights["token_embd.weight"]
    plans = [llama_moe.plan(path, devices=[], lora=lora) for lora in ((), adapter)]
    before, now = (plan.predict(bandwidths=HOST).bytes_per_token["CPU"] for plan in plans)
    assert now - before == 4 * width * 4  # B, of rank 4 in F32


def test_what_a_plan_measures_has_the_formats_of_its_adapters(
    path: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_MOE_CACHE", str(tmp_path))
    plan = llama_moe.plan(path, devices=[], lora=adapter)
    cpu = plan.bandwidths().devices["CPU"]
    assert 4 in cpu.products["F32"]  # the rows of B are as long as its rank
    assert 4 in cpu.expert_products["F32"]
    assert plan.predict().decode_tokens_per_second > 0


def test_adapters_of_experts_in_host_memory_are_not_copied_to_the_gpu(path: Path, folder: Path) -> None:
    write_lora(folder / "wide.gguf", weights_of(path, containing=("_exps",)), architecture="llama", rank=64)

    def on_gpu(*lora: Path) -> int:
        spec = DeviceSpec("GPU", "1GiB")
        # Fewer tokens at once than those for which llama.cpp would copy weights too.
        return llama_moe.plan(path, devices=spec, experts="cpu", lora=lora, context_size=256, micro_batch_size=16).device_bytes

    assert on_gpu(folder / "wide.gguf") == on_gpu()


def test_an_importance_matrix_is_of_the_weights_and_of_inputs_that_it_changes(
    path: Path, merged: Path, adapter: Path, tmp_path: Path
) -> None:
    import gguf

    text, out = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text("One, two, three, four. " * 40, encoding="utf-8")

    def sums(file: Path, *options: object) -> dict[str, Floats]:
        done = cli("imatrix", file, "-f", text, "-o", out, "--ctx", 64, "--threads", 1, *options)
        assert done.returncode == 0, done.stderr
        return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(out).tensors}

    with_it, expected, without = sums(path, "--lora", f"{adapter}={SCALE}"), sums(merged), sums(path)
    assert with_it.keys() == expected.keys() == without.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(with_it[name], values, rtol=0.02)
    assert any(np.abs(without[name] / values - 1).max() > 0.5 for name, values in expected.items() if name.endswith(".in_sum2"))


def test_fit_leaves_room_for_it(path: Path, adapter: Path) -> None:
    def needed(lora: list[Path]) -> int:
        return llama_moe.plan(path, devices=DeviceSpec("GPU", "1GiB"), experts="gpu", lora=lora, context_size=256).device_bytes

    room = needed([]) + (needed([adapter]) - needed([])) // 2
    spec = DeviceSpec("GPU", room)
    fit = ExpertPlacement.fit(reserve=0)
    assert llama_moe.plan(path, devices=spec, experts=fit, context_size=256).summary == "fit: all experts stay with their layers"
    assert "in host memory are" in llama_moe.plan(path, devices=spec, experts=fit, lora=adapter, context_size=256).summary


# ---- engines, and what is kept


def test_an_engine_computes_with_it(path: Path, merged: Path, adapter: Path) -> None:
    params = SamplingParams(max_tokens=16, temperature=0)
    prompts = ["Hello", "One, two,", "Red"]
    with llama_moe.load(merged, devices=[], repack=False, context_size=256, max_sequences=3) as llm:
        expected = [each.text for each in llm.generate(prompts, params)]
    with llama_moe.load(path, devices=[], repack=False, context_size=256, max_sequences=3, lora=LoraAdapter(adapter, SCALE)) as llm:
        assert [each.text for each in llm.generate(prompts, params)] == expected
        assert llm.generate(prompts[0] + expected[0], params).cached_tokens > 0
    with (
        Model(path, devices=[], repack=False, lora=LoraAdapter(adapter, SCALE)) as draft,
        llama_moe.load(merged, devices=[], repack=False, context_size=256, speculative=Speculative.draft(draft)) as llm,
    ):
        assert llm.generate(prompts[0], params).text == expected[0]
        assert llm.stats()["draft_acceptance_rate"] > 0.5  # the draft model computes with it too


def test_what_was_saved_is_refused_with_other_adapters(path: Path, folder: Path, adapter: Path) -> None:
    write_lora(folder / "seed2.gguf", weights_of(path, containing=PARTS), architecture="llama", seed=2)
    kinds: list[list[LoraAdapter]] = [
        [],
        [LoraAdapter(adapter)],
        [LoraAdapter(adapter, 0.5)],
        [LoraAdapter(folder / "seed2.gguf")],
        [LoraAdapter(adapter), LoraAdapter(folder / "seed2.gguf")],
    ]
    states = []
    for number, lora in enumerate(kinds):
        with Model(path, devices=[], lora=lora) as model, Context(model) as context:
            context.decode(TOKENS)
            states.append(context.save_state(0))
        with llama_moe.load(path, devices=[], context_size=256, lora=lora) as llm:
            llm.save_prefix("Once upon a time", folder / f"{number}.prefix")
    for number, lora in enumerate([*kinds, [LoraAdapter(adapter, 0)]]):
        own = number % len(kinds)
        with Model(path, devices=[], lora=lora) as model, Context(model) as context:
            for other, state in enumerate(states):
                if other == own:
                    context.load_state(state, 0)
                else:
                    with pytest.raises(InvalidOptionError, match="of another model, or of other LoRA adapters"):
                        context.load_state(state, 0)
        with llama_moe.load(path, devices=[], context_size=256, lora=lora) as llm:
            llm.load_prefix(folder / f"{own}.prefix")
            with pytest.raises(InvalidOptionError, match="of another model, or of other LoRA adapters"):
                llm.load_prefix(folder / f"{(own + 1) % len(kinds)}.prefix")


def test_routing_is_traced_with_it(path: Path, merged: Path, adapter: Path) -> None:
    def counts(file: Path, lora: list[LoraAdapter]) -> object:
        with Model(file, devices=[], repack=False, lora=lora) as model, Context(model) as context, context.trace_routing() as routing:
            context.decode(TOKENS, outputs="all")
        return routing.counts

    np.testing.assert_array_equal(counts(path, [LoraAdapter(adapter, SCALE)]), counts(merged, []))


# ---- what is refused


def refused(path: Path, adapter: Path | str, match: str) -> None:
    with pytest.raises(ModelLoadError, match=match):
        Model(path, devices=[], lora=[adapter])
    with pytest.raises(ModelLoadError, match=match):
        llama_moe.plan(path, devices=[], lora=[adapter])


def test_what_is_no_adapter_is_refused(path: Path, folder: Path, adapter: Path) -> None:
    weights = weights_of(path, containing=("attn_q",))
    with pytest.raises(FileNotFoundError, match="no such file: '/no/such'"):
        Model(path, devices=[], lora="/no/such")
    refused(path, path, r"is not a LoRA adapter: its general\.type is '.*' and its adapter\.type '', not 'adapter' and 'lora'")
    write_lora(folder / "kind.gguf", weights, architecture="llama", metadata={"adapter.type": "other"})
    refused(path, folder / "kind.gguf", "is not a LoRA adapter: .* its adapter.type 'other'")
    write_lora(folder / "architecture.gguf", weights, architecture="qwen3moe")
    refused(path, folder / "architecture.gguf", "is an adapter for a model of the architecture 'qwen3moe'; .* is of 'llama'")
    write_lora(folder / "empty.gguf", {}, architecture="llama")
    refused(path, folder / "empty.gguf", "is a LoRA adapter without tensors")
    broken = folder / "broken.gguf"
    broken.write_bytes(adapter.read_bytes()[:-1000])
    refused(path, broken, "is truncated")


@pytest.mark.parametrize(
    ("weight", "shape", "match"),
    [
        (
            "blk.0.no_such.weight",
            (64, 64),
            r"changes 'blk\.0\.no_such\.weight', which .* does not have: it is an adapter for another model",
        ),
        (
            "blk.0.attn_q.weight",
            (64, 32),
            r"does not fit .*: 'blk\.0\.attn_q\.weight' is 64 x 64 there, and the adapter has 32 x 4 and 4 x 64",
        ),
        ("blk.0.attn_q.weight", (96, 64), r"is 64 x 64 there, and the adapter has 64 x 4 and 4 x 96"),
        ("blk.0.ffn_up_exps.weight", (2, 96, 64), r"'blk\.0\.ffn_up_exps\.weight' is 64 x 96 x 4 there, and the adapter has 64 x 4 x 2"),
        ("blk.0.ffn_up_exps.weight", (96, 64), r"is 64 x 96 x 4 there, and the adapter has 64 x 4 and 4 x 96"),
        ("blk.0.attn_norm.weight", (64, 64), r"does not fit"),
    ],
)
def test_an_adapter_of_another_model_is_refused(path: Path, folder: Path, weight: str, shape: tuple[int, ...], match: str) -> None:
    write_lora(folder / "misfit.gguf", {weight: shape}, architecture="llama")
    refused(path, folder / "misfit.gguf", match)


def test_half_a_pair_and_a_strange_name_are_refused(path: Path, folder: Path) -> None:
    import gguf

    for name, match in (("blk.0.attn_q.weight.lora_a", "has only one of"), ("blk.0.attn_q.weight", "those of a LoRA adapter end with")):
        writer = gguf.GGUFWriter(folder / "half.gguf", "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_tensor(name, np.zeros((4, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(path, folder / "half.gguf", match)


def test_a_scale_must_be_a_number(path: Path, adapter: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"scale of LoRA adapter .* is nan; it must be a finite number"):
        Model(path, devices=[], lora=LoraAdapter(adapter, float("nan")))
    with pytest.raises(TypeError, match="scale of a LoraAdapter must be a number, not 'x'"):
        LoraAdapter(adapter, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path of a LoraAdapter must be a path, not 5"):
        Model(path, lora=[5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="lora must be LoRA adapters"):
        Model(path, lora=5)  # type: ignore[arg-type]


# ---- commands


def test_commands_take_it(path: Path, merged: Path, adapter: Path) -> None:
    def run(file: Path, *lora: object) -> str:
        done = cli("run", file, "-p", "Hello", "-n", 12, "--ctx", 256, "--temp", 0, "--threads", 1, "--no-repack", *lora)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(path, "--lora", f"{adapter}={SCALE}") == run(merged)
    assert run(path, "--lora", f"{adapter}=0") == run(path)
    planned = cli("plan", path, "--lora", adapter, "--ctx", 256, "--no-predict")
    assert planned.returncode == 0, planned.stderr
    assert "adapters" in planned.stdout
    missing = cli("run", path, "-p", "Hello", "--lora", "/no/such=2")
    assert missing.returncode == 1
    assert "no such file: '/no/such'" in missing.stderr


def test_a_server_computes_with_it(path: Path, merged: Path, adapter: Path) -> None:
    options = ["--ctx", 256, "--threads", 1, "--no-repack"]

    def text(*arguments: object) -> str:
        with ServerProcess("--model", *arguments, *options) as server:
            body = {"model": Path(str(arguments[0])).stem, "prompt": "Hello", "max_tokens": 12, "temperature": 0}
            answer = server.client.post("/v1/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["text"])

    assert text(path, "--lora", f"{adapter}={SCALE}") == text(merged)


def test_header_is_as_llama_cpp_writes_it(adapter: Path) -> None:
    info = llama_moe.inspect(adapter)
    assert (info.architecture, info.metadata["adapter.lora.alpha"]) == ("llama", struct.unpack("f", struct.pack("f", 8.0))[0])
