"""Predicted decode speed, compared with what can be computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from llama_moe.bandwidth import DeviceRates
from llama_moe.errors import InvalidOptionError
from llama_moe.prediction import PlacedTensor, Prediction, predict_decode

MB, GB = 10**6, 10**9


def tensor(
    name: str, size: int, *, device: str = "CPU", role: str = "weights", type_name: str = "Q4_K", columns: int = 2048
) -> PlacedTensor:
    layer = int(name.split(".")[1]) if name.startswith("blk.") else None
    shape = (columns,) if "norm" in name else (columns, 8, 4) if role == "experts" else (columns, 8)
    return PlacedTensor(name=name, type=type_name, shape=shape, bytes=size, device=device, role=role, layer=layer)  # type: ignore[arg-type]


def model(*, layers: str = "CPU", experts: str = "CPU", output: str = "CPU") -> list[PlacedTensor]:
    """Two layers of 10 MB and 400 MB of experts, an output of 50 MB, an embedding of 30 MB."""
    result = [tensor("token_embd.weight", 30 * MB, role="embedding")]
    for layer in range(2):
        result.append(tensor(f"blk.{layer}.attn_q.weight", 10 * MB, device=layers))
        result.append(tensor(f"blk.{layer}.ffn_up_exps.weight", 400 * MB, device=experts, role="experts"))
    return [*result, tensor("output.weight", 50 * MB, device=output, role="output")]


CPU = DeviceRates.stated("CPU", bytes_per_second=10 * GB)
GPU = DeviceRates.stated("GPU", bytes_per_second=100 * GB)
RATES = {"CPU": CPU, "GPU": GPU}


def predict(tensors: list[PlacedTensor], rates: dict[str, DeviceRates] = RATES, **options: Any) -> Prediction:
    return predict_decode(tensors, rates, **{"expert_count": 8, "experts_used": 2, **options})


def test_a_token_reads_all_weights_but_the_embedding_and_its_share_of_the_experts() -> None:
    prediction = predict(model())
    # 2 * 10 MB + 2 / 8 of 800 MB + 50 MB at 10 GB/s
    assert prediction.bytes_per_token == {"CPU": 270 * MB}
    assert prediction.decode_tokens_per_second == pytest.approx(1 / 0.027)
    assert prediction.seconds["CPU"]["weights"] == pytest.approx(0.002)
    assert prediction.seconds["CPU"]["experts"] == pytest.approx(0.020)
    assert prediction.seconds["CPU"]["output"] == pytest.approx(0.005)


def test_biases_of_experts_are_added_and_not_multiplied_with() -> None:
    bias = tensor("blk.0.ffn_up_exps.bias", MB, role="experts", type_name="F32")
    rates = {"CPU": replace(CPU, any_product=None, products={"Q4_K": {2048: 10.0 * GB}}, expert_products={"Q4_K": {2048: 10.0 * GB}})}
    prediction = predict([*model(), bias], rates)  # which has no rate of F32
    assert prediction.decode_tokens_per_second == pytest.approx(1 / 0.027)
    rates["CPU"] = replace(rates["CPU"], operation_seconds=1e-3)
    more, before = (sum(predict(tensors, rates).seconds["CPU"].values()) for tensors in ([*model(), bias], model()))
    assert more - before == pytest.approx(1e-3)  # an operation, as a norm is


def test_devices_compute_one_after_the_other() -> None:
    prediction = predict(model(layers="GPU", output="GPU"))
    assert sum(prediction.seconds["CPU"].values()) == pytest.approx(0.020)
    assert sum(prediction.seconds["GPU"].values()) == pytest.approx(0.0007)
    assert prediction.decode_tokens_per_second == pytest.approx(1 / 0.0207)


def test_a_dense_model_reads_everything() -> None:
    dense = [replace(each, role="weights", shape=(2048, 8)) if each.role == "experts" else each for each in model()]
    assert predict_decode(dense, RATES).bytes_per_token == {"CPU": 870 * MB}


def test_a_tied_embedding_is_read_as_the_output() -> None:
    tied = [each for each in model() if each.role != "output"]
    assert predict(tied).seconds["CPU"]["output"] == pytest.approx(0.003)
    on_gpu = [*tied, tensor("token_embd.weight", 30 * MB, device="GPU", role="output")]
    assert "output" not in predict(on_gpu).seconds["CPU"]
    assert predict(on_gpu).seconds["GPU"]["output"] == pytest.approx(0.0003)


def test_each_number_format_and_length_of_rows_has_its_rate() -> None:
    cpu = DeviceRates(
        device="CPU",
        products={"Q4_K": {2048: 10 * GB, 512: 5 * GB}, "Q6_K": {2048: 20 * GB}},
        expert_products={"Q4_K": {2048: 8 * GB}},
    )
    tensors = [
        tensor("blk.0.attn_q.weight", 100 * MB),
        tensor("blk.0.attn_k.weight", 100 * MB, columns=512),
        tensor("blk.0.attn_v.weight", 100 * MB, type_name="Q6_K", columns=4096),
        tensor("blk.0.ffn_up_exps.weight", 400 * MB, role="experts"),
    ]
    seconds = predict(tensors, {"CPU": cpu}).seconds["CPU"]
    assert seconds["weights"] == pytest.approx(0.010 + 0.020 + 0.005)
    assert seconds["experts"] == pytest.approx(100 * MB / (8 * GB))


def test_the_nearest_length_of_rows_stands_for_one_that_was_not_measured() -> None:
    rates = DeviceRates(device="CPU", products={"Q4_K": {512: 1.0, 2048: 2.0}})
    assert [rates.product("Q4_K", columns) for columns in (256, 512, 900, 1100, 8192)] == [1.0, 1.0, 1.0, 2.0, 2.0]


def test_operations_are_those_of_a_transformer() -> None:
    cpu = replace(CPU, operation_seconds=0.001)
    tensors = [*model(), tensor("output_norm.weight", 0), *(tensor(f"blk.{layer}.attn_norm.weight", 0) for layer in range(2))]
    # Products 5, norms 3; in each layer 6 of attention and 9 of the experts, and one more for the second expert.
    assert predict(tensors, {"CPU": cpu}).seconds["CPU"]["operations"] == pytest.approx(0.001 * (5 + 3 + 2 * (6 + 9 + 1)))
    # Counted ones replace the estimate.
    assert predict(tensors, {"CPU": cpu}, operations_per_token=100).seconds["CPU"]["operations"] == pytest.approx(0.1)


def test_counted_operations_are_shared_out_as_the_estimated_ones() -> None:
    rates = {name: replace(each, operation_seconds=0.001) for name, each in RATES.items()}
    counted = predict(model(layers="GPU", output="GPU"), rates, operations_per_token=1000)
    assert counted.seconds["CPU"]["operations"] + counted.seconds["GPU"]["operations"] == pytest.approx(1.0)
    # 2 products of experts there; 3 products and 16 others in each of 2 layers here.
    assert counted.seconds["GPU"]["operations"] == pytest.approx(35 / 37)


def test_attention_reads_the_context_once_for_each_query_head() -> None:
    cpu = replace(CPU, attention=20.0 * GB)
    options: dict[str, Any] = {"kv_bytes_per_token": {"CPU": 100_000}, "query_heads_per_kv_head": 4.0}
    short = predict(model(), {"CPU": cpu}, **options)
    long = predict(model(), {"CPU": cpu}, context_used=10_000, **options)
    assert short.context_used == 128
    assert short.seconds["CPU"]["attention"] == pytest.approx(100_000 * 128 * 4 / (20 * GB))
    assert long.seconds["CPU"]["attention"] == pytest.approx(100_000 * 10_000 * 4 / (20 * GB))
    assert long.bytes_per_token["CPU"] == 270 * MB + 100_000 * 10_000
    assert predict(model(), {"CPU": cpu}, context_used=0, **options).decode_tokens_per_second == pytest.approx(1 / 0.027)


@pytest.mark.parametrize(
    ("placement", "crossings"),
    [
        ({}, {}),
        ({"layers": "GPU", "experts": "GPU", "output": "GPU"}, {"GPU": 2}),  # in, and out
        ({"layers": "GPU", "experts": "CPU", "output": "GPU"}, {"GPU": 6}),  # and to the experts of each layer and back
        ({"layers": "GPU", "experts": "GPU", "output": "CPU"}, {"GPU": 2}),
        ({"layers": "CPU", "experts": "CPU", "output": "GPU"}, {"GPU": 2}),
        ({"layers": "GPU", "experts": "B", "output": "GPU"}, {"GPU": 6, "B": 4}),
    ],
)
def test_steps_between_devices_are_counted(placement: dict[str, str], crossings: dict[str, int]) -> None:
    rates = {name: replace(GPU, device=name, crossing_seconds=0.001) for name in ("GPU", "B")} | {"CPU": CPU}
    seconds = predict(model(**placement), rates).seconds
    counted = {name: round(parts["crossings"] / 0.001) for name, parts in seconds.items() if "crossings" in parts}
    assert counted == crossings


def test_layers_on_two_devices_are_crossed_between() -> None:
    rates = {name: replace(GPU, device=name, crossing_seconds=0.001) for name in ("GPU", "B")} | {"CPU": CPU}
    tensors = [replace(each, device="B" if each.layer == 1 else "GPU") if each.role != "embedding" else each for each in model()]
    seconds = predict(tensors, rates).seconds
    # CPU to GPU, GPU to B, B to GPU for the output, GPU to CPU
    assert seconds["GPU"]["crossings"] == pytest.approx(0.004)
    assert seconds["B"]["crossings"] == pytest.approx(0.002)


def test_what_does_not_fit_the_memory_comes_from_the_disk() -> None:
    # 900 MB on the host, 100 MB of which every token uses or which stays; of 800 MB of experts a quarter does not fit.
    prediction = predict(model(), ram=700 * MB, disk_bytes_per_second=1.0 * GB)
    assert prediction.seconds["disk"]["experts"] == pytest.approx(800 * MB * 2 / 8 / 4 / GB)
    assert any("do not fit" in assumption for assumption in prediction.assumptions)
    assert "disk" not in predict(model(), ram=900 * MB).seconds
    with pytest.raises(InvalidOptionError, match="disk_bytes_per_second"):
        predict(model(), ram=700 * MB)


def test_weights_that_every_token_uses_and_that_do_not_fit_are_read_each_time() -> None:
    prediction = predict(model(), ram=50 * MB, disk_bytes_per_second=1.0 * GB)
    assert prediction.seconds["disk"]["experts"] == pytest.approx((800 * MB / 4 + 50 * MB) / GB)


def adapters() -> list[PlacedTensor]:
    """Of a weight of 10 MB and of experts of 400 MB: A of 1 MB and B of 2 MB, and of 8 and 16 MB."""
    return [
        replace(weight, name=f"{weight.name}.lora_{matrix}", bytes=size, type="F16")
        for weight, sizes in zip(model()[1:3], ((MB, 2 * MB), (8 * MB, 16 * MB)), strict=True)
        for matrix, size in zip("ab", sizes, strict=True)
    ]


def test_adapters_are_read_as_the_weights_that_they_change() -> None:
    prediction = predict([*model(), *adapters()])
    # 3 MB more, and 2 / 8 of 24 MB.
    assert prediction.bytes_per_token == {"CPU": 279 * MB}
    assert prediction.seconds["CPU"]["weights"] == pytest.approx(0.0023)
    assert prediction.seconds["CPU"]["experts"] == pytest.approx(0.0206)
    # Two products of each, its scale and its addition.
    cpu = replace(CPU, operation_seconds=1e-3)
    more, before = (predict(tensors, {"CPU": cpu}).seconds["CPU"]["operations"] for tensors in ([*model(), *adapters()], model()))
    assert more - before == pytest.approx(8e-3)


def test_adapters_stay_in_a_memory_that_is_too_small() -> None:
    # They take 27 MB. Of 800 MB of experts 200 MB do not fit in either.
    with_them = predict([*model(), *adapters()], ram=727 * MB, disk_bytes_per_second=1.0 * GB)
    without = predict(model(), ram=700 * MB, disk_bytes_per_second=1.0 * GB)
    assert with_them.seconds["disk"]["experts"] == pytest.approx(without.seconds["disk"]["experts"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_count": 8, "experts_used": 9}, "experts_used is 9"),
        ({"expert_count": 8, "experts_used": 0}, "experts_used is 0"),
        ({"context_used": -1}, "context_used is -1"),
        ({"kv_bytes_per_token": {"CUDA3": 1.0}}, "no rates of device 'CUDA3'; there are those of CPU, GPU"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        predict(model(), **options)


def test_rates_that_are_not_known_are_an_error() -> None:
    with pytest.raises(InvalidOptionError, match="Q4_K is known of CPU"):
        predict(model(), {"CPU": DeviceRates(device="CPU", products={"Q6_K": {2048: 1.0}})})
    with pytest.raises(InvalidOptionError, match="no rates of device 'GPU'; there are those of CPU"):
        predict(model(layers="GPU"), {"CPU": CPU})
    with pytest.raises(InvalidOptionError, match="nothing is computed"):
        predict([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bytes_per_second": 0}, "bytes_per_second is 0"),
        ({"bytes_per_second": float("nan")}, "bytes_per_second is nan"),
        ({"bytes_per_second": 1.0, "crossing_seconds": -1.0}, "crossing_seconds is -1"),
    ],
)
def test_senseless_stated_rates_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        DeviceRates.stated("GPU", **options)


@pytest.mark.parametrize(("rate", "text"), [(311.6, "312"), (31.4, "31"), (3.14, "3.1"), (0.0314, "0.031"), (9.99, "10.0")])
def test_a_prediction_says_that_it_is_one(rate: float, text: str) -> None:
    prediction = replace(predict(model()), decode_tokens_per_second=rate)
    assert str(prediction) == f"about {text} tokens/s (predicted)"


def test_a_prediction_goes_through_json_with_its_assumptions() -> None:
    facts = json.loads(json.dumps(predict(model()).to_dict()))
    assert facts["predicted"] is True
    assert facts["seconds"]["CPU"]["experts"] == pytest.approx(0.020)
    assert "a token reads 2 of 8 experts in each layer" in facts["assumptions"]
    assert "CPU: rates as stated" in facts["assumptions"]
