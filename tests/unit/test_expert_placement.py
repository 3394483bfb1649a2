from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from llama_moe import Device, ExpertPlacement, Placement, TensorPlacement
from llama_moe.errors import InvalidOptionError, PlacementError
from llama_moe.placement import as_placement

GPU = Device(name="CUDA0", description="a GPU", kind="gpu", backend="CUDA", memory_free=1, memory_total=2)

ALL_KINDS = [
    ExpertPlacement.gpu(),
    ExpertPlacement.cpu(),
    ExpertPlacement.cpu(projections=("down",)),
    ExpertPlacement.cpu_first(3),
    ExpertPlacement.cpu_last(3),
    ExpertPlacement.cpu_layers([0, 2]),
    ExpertPlacement.match("exps"),
    ExpertPlacement.rules([("up_exps", "CUDA0"), ("exps", "CPU")]),
    ExpertPlacement.fit(),
    ExpertPlacement.fit(vram="8GiB", ram="1GiB", reserve=0),
]


@pytest.mark.parametrize("placement", ALL_KINDS, ids=repr)
def test_a_policy_is_a_value(placement: ExpertPlacement) -> None:
    assert copy.deepcopy(placement) == placement
    assert pickle.loads(pickle.dumps(placement)) == placement
    assert ALL_KINDS.count(placement) == 1
    assert len({placement, copy.copy(placement)}) == 1
    with pytest.raises(FrozenInstanceError):
        placement.count = 1  # type: ignore[misc]


@pytest.mark.parametrize("placement", [item for item in ALL_KINDS if item.kind != "fit"], ids=repr)
def test_repr_is_the_call_that_makes_it(placement: ExpertPlacement) -> None:
    assert eval(repr(placement)) == placement


def test_repr_of_fit_shows_bytes() -> None:
    assert repr(ExpertPlacement.fit(vram="1KiB", reserve=2)) == "ExpertPlacement.fit(vram=1024, reserve=2)"


def test_match_is_one_rule() -> None:
    assert ExpertPlacement.match("exps", "CUDA0") == ExpertPlacement.rules([("exps", "CUDA0")])
    assert ExpertPlacement.match("exps") == ExpertPlacement.rules([("exps", "CPU")])


def test_a_device_object_stands_for_its_name() -> None:
    assert ExpertPlacement.match("exps", GPU) == ExpertPlacement.match("exps", "CUDA0")


def test_layers_and_projections_have_no_order() -> None:
    assert ExpertPlacement.cpu_layers([3, 1, 3]) == ExpertPlacement.cpu_layers(range(1, 4, 2))
    assert ExpertPlacement.cpu(projections=("down", "up")) == ExpertPlacement.cpu(projections=("up", "down"))
    assert ExpertPlacement.cpu(projections=("gate", "down", "up")) == ExpertPlacement.cpu()


def test_numpy_integers_are_integers() -> None:
    assert ExpertPlacement.cpu_first(np.int64(2)) == ExpertPlacement.cpu_first(2)
    assert ExpertPlacement.cpu_layers(np.arange(2)) == ExpertPlacement.cpu_layers([0, 1])


@pytest.mark.parametrize("name", ["gpu", "cpu", "fit"])
def test_a_name_stands_for_the_policy_with_its_defaults(name: str) -> None:
    assert as_placement(name) == getattr(ExpertPlacement, name)()  # type: ignore[arg-type]


def test_a_policy_stands_for_itself() -> None:
    placement = ExpertPlacement.cpu_first(1)
    assert as_placement(placement) is placement


def test_another_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(PlacementError, match=r"unknown expert placement 'CPU'; expected 'gpu', 'cpu', 'fit' or an ExpertPlacement"):
        as_placement("CPU")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 3, ["cpu"]])
def test_another_type_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="experts must be an ExpertPlacement"):
        as_placement(value)  # type: ignore[arg-type]


def test_a_negative_number_of_layers_is_refused() -> None:
    with pytest.raises(PlacementError, match="n = -1"):
        ExpertPlacement.cpu_first(-1)
    with pytest.raises(PlacementError, match="layer = -2"):
        ExpertPlacement.cpu_layers([0, -2])


@pytest.mark.parametrize("n", ["3", 1.0, True, None])
def test_a_number_of_layers_is_an_int(n: object) -> None:
    with pytest.raises(TypeError, match="n must be an int"):
        ExpertPlacement.cpu_last(n)  # type: ignore[arg-type]


def test_an_unknown_projection_is_refused_with_those_that_exist() -> None:
    with pytest.raises(PlacementError, match="unknown projection 'gate_up'; expected some of 'up', 'gate', 'down'"):
        ExpertPlacement.cpu(projections=("up", "gate_up"))  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match="no projection given"):
        ExpertPlacement.cpu(projections=())


@pytest.mark.parametrize("rule", ["ab", ("exps",), ("exps", "CPU", "CPU"), (1, "CPU")])
def test_a_rule_is_a_pair(rule: object) -> None:
    with pytest.raises(TypeError, match=r"a placement rule must be \(regex, device\)"):
        ExpertPlacement.rules([rule])  # type: ignore[list-item]


def test_a_rule_names_a_device() -> None:
    with pytest.raises(TypeError, match=r"a device must be a llama_moe\.Device or its name, not 0"):
        ExpertPlacement.match("exps", 0)  # type: ignore[arg-type]


def test_a_size_of_fit_is_checked_with_its_name() -> None:
    with pytest.raises(InvalidOptionError, match=r"^vram: 'much'"):
        ExpertPlacement.fit(vram="much")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        ExpertPlacement.fit(vrma="8GiB")  # type: ignore[call-arg]


TENSORS = [
    TensorPlacement("token_embd.weight", "CPU", "embedding", 100),
    TensorPlacement("blk.0.ffn_up_exps.weight", "CPU", "experts", 3 * 2**20),
    TensorPlacement("blk.0.attn_q.weight", "RPC0", "weights", 2**20),
    TensorPlacement("output.weight", "RPC0", "output", 100),
]


def test_a_placement_is_a_sequence_of_tensors() -> None:
    placement = Placement(TENSORS)
    assert list(placement) == TENSORS
    assert placement[-1] == TENSORS[-1]
    assert placement[1:3] == Placement(TENSORS[1:3])
    assert TENSORS[2] in placement
    assert placement == Placement(iter(TENSORS))
    assert hash(placement) == hash(Placement(TENSORS))
    assert placement != Placement(TENSORS[:2])
    assert placement != TENSORS


def test_a_placement_adds_up_by_device_and_role() -> None:
    placement = Placement(TENSORS)
    assert placement.by_device() == {"CPU": 3 * 2**20 + 100, "RPC0": 2**20 + 100}
    assert placement.by_role() == {"embedding": 100, "experts": 3 * 2**20, "weights": 2**20, "output": 100}
    assert placement.total_bytes == sum(tensor.bytes for tensor in TENSORS)


def test_a_placement_prints_as_a_table_of_devices_and_roles() -> None:
    assert str(Placement(TENSORS)) == (
        "device  experts  weights  embedding  output    total\n"
        "CPU     3.0 MiB        -      100 B       -  3.0 MiB\n"
        "RPC0          -  1.0 MiB          -   100 B  1.0 MiB\n"
        "total   3.0 MiB  1.0 MiB      100 B   100 B  4.0 MiB"
    )
    assert repr(Placement(TENSORS)) == "<Placement of 4 tensors, 4.0 MiB: CPU 3.0 MiB, RPC0 1.0 MiB>"
