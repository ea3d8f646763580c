"""Every setting of AdapterHub's is either ours in other words, or harmless, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_lightning.errors import CheckpointError
from peft_lightning.files.adapterhub_config import bottleneck_of, from_config, reduction_factor, to_config
from peft_lightning.layers.adapters import AdapterConfig

HOULSBY = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "swish"}
PFEIFFER = {**HOULSBY, "mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"}
PARALLEL = {**PFEIFFER, "original_ln_before": False, "is_parallel": True, "scaling": 4.0}
LORA = {"architecture": "lora", "r": 4, "alpha": 8, "attn_matrices": ["q", "v"]}


def read(config: dict[str, Any], depth: int = 3, **top: Any) -> tuple[AdapterConfig, list[str]]:
    head = {"config": config, "hidden_size": 32, "name": "n", "version": "adapters.1.3.0", **top}
    return from_config({key: value for key, value in head.items() if value != "absent"}, depth, "file")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HOULSBY, {"kind": "houlsby", "bottleneck": 8, "nonlinearity": "silu", "scaling": 1.0}),
        (PFEIFFER, {"kind": "pfeiffer", "bottleneck": 8, "nonlinearity": "relu", "scaling": 1.0}),
        (PARALLEL, {"kind": "parallel", "bottleneck": 8, "nonlinearity": "relu", "scaling": 4.0}),
        (LORA, {"kind": "lora", "bottleneck": 4, "scaling": 2.0}),
        ({**HOULSBY, "reduction_factor": 4.5}, {"bottleneck": 7, "nonlinearity": "silu", "scaling": 1.0}),
        ({**HOULSBY, "reduction_factor": 99}, {"bottleneck": 1, "nonlinearity": "silu", "scaling": 1.0}),
        ({**HOULSBY, "residual_before_ln": False}, {"bottleneck": 8, "nonlinearity": "silu", "scaling": 1.0}),
        (
            {**HOULSBY, "reduction_factor": {"0": 4, "default": 4}},
            {"bottleneck": 8, "nonlinearity": "silu", "scaling": 1.0},
        ),
    ],
)
def test_kinds(config: dict[str, Any], expected: dict[str, Any]) -> None:
    adapter, notes = read(config)
    assert adapter == AdapterConfig(**{"kind": "houlsby", "name": "n", **expected})
    assert notes == []


@pytest.mark.parametrize(
    ("config", "sites", "others"),
    [
        ({**HOULSBY, "mh_adapter": False}, ["0.output", "2.output"], ["0.attention.output"]),
        ({**HOULSBY, "output_adapter": False}, ["0.attention.output"], ["0.output"]),
        ({**HOULSBY, "leave_out": [1]}, ["0.output", "2.attention.output"], ["1.output", "12.output"]),
        ({**LORA, "attn_matrices": ["k"]}, ["1.attention.self.key"], ["1.attention.self.query"]),
        (
            {**LORA, "intermediate_lora": True, "output_lora": True},
            ["1.attention.self.query", "1.intermediate.dense", "1.output.dense"],
            ["1.attention.output.dense", "1.attention.self.key"],
        ),
        ({**LORA, "selfattn_lora": False, "output_lora": True}, ["0.output.dense"], ["0.attention.self.query"]),
    ],
)
def test_places(config: dict[str, Any], sites: list[str], others: list[str]) -> None:
    import re

    target = read(config)[0].target
    assert target is not None
    assert all(re.search(target, f"encoder.layer.{site}") for site in sites)
    assert not any(re.search(target, f"encoder.layer.{site}") for site in others)


@pytest.mark.parametrize(
    ("spoken", "version", "ours"),
    [
        ("gelu", "adapters.1.3.0", "gelu"),
        ("gelu", "absent", "gelu_new"),
        ("gelu_orig", "absent", "gelu"),
        ("gelu_new", "3.2.1", "gelu_new"),
        ("Swish", "1", "silu"),
        ("silu", "1", "silu"),
        ("leakyrelu", "1", "leaky_relu"),
        ("linear", "1", "identity"),
        ("tanh", "1", "tanh"),
    ],
)
def test_activations_and_their_old_names(spoken: str, version: str, ours: str) -> None:
    assert read({**HOULSBY, "non_linearity": spoken}, version=version)[0].nonlinearity == ours


@pytest.mark.parametrize(
    ("version", "scaling"),
    [("adapters.1.0.1", 1.0), ("adapters.0.2.1", 1.0), ("adapters.1.1.0", 2.0), ("adapters.1.10.0", 2.0), ("3.2", 2.0)],
)
def test_lora_of_versions_that_ignored_alpha(version: str, scaling: float) -> None:
    adapter, notes = read(LORA, version=version)
    assert adapter.scaling == scaling
    assert bool(notes) == (scaling == 1.0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**HOULSBY, "ln_before": True}, "ln_before = True"),
    ({**HOULSBY, "ln_after": True}, "ln_after = True"),
    ({**HOULSBY, "original_ln_after": False}, "original_ln_after = False"),
    ({**HOULSBY, "phm_layer": True}, "phm_layer = True"),
    ({**HOULSBY, "use_gating": True}, "use_gating = True"),
    ({**HOULSBY, "scaling": "learned"}, "scaling = learned"),
    ({**HOULSBY, "scaling": True}, "scaling = True"),
    ({**HOULSBY, "scaling": float("nan")}, "scaling = nan"),
    ({**HOULSBY, "scaling": 10**400}, "scaling = 1000"),
    ({**HOULSBY, "residual_before_ln": "post_add"}, "residual_before_ln = post_add"),
    ({**PFEIFFER, "residual_before_ln": False}, "residual_before_ln = False"),
    ({**PFEIFFER, "mh_adapter": True}, "mh_adapter = True"),
    ({**PARALLEL, "mh_adapter": True}, "mh_adapter = True"),
    ({**HOULSBY, "mh_adapter": False, "output_adapter": False}, "output_adapter = False"),
    ({**HOULSBY, "reduction_factor": {"0": 4, "default": 8}}, "reduction_factor = .*the same in all layers"),
    ({**HOULSBY, "reduction_factor": 0}, "reduction_factor = 0"),
    ({**HOULSBY, "reduction_factor": -1}, "reduction_factor = -1"),
    ({**HOULSBY, "reduction_factor": 1e-300}, "reduction_factor = 1e-300"),
    ({**HOULSBY, "reduction_factor": None}, "reduction_factor = None"),
    ({**HOULSBY, "reduction_factor": "4"}, "reduction_factor = 4"),
    ({**HOULSBY, "non_linearity": "mish"}, "non_linearity = mish.*must be relu"),
    ({**HOULSBY, "leave_out": [0, 1, 2]}, "leave_out = .*fewer than all 3"),
    ({**HOULSBY, "leave_out": ["0"]}, "leave_out = .*numbers of layers"),
    ({**HOULSBY, "mh_adapter": "no"}, "mh_adapter = no: must be true or false"),
    ({**HOULSBY, "output_adapter": None}, "output_adapter = None: must be true or false"),
    ({**HOULSBY, "ln_before": 0}, "ln_before = 0: must be true or false"),
    ({**HOULSBY, "is_parallel": "x" * 300}, "is_parallel = xxx.*[.]{3}: must be true or false"),
    ({**HOULSBY, "dropout": "0.5"}, "dropout = 0.5.*must be a number"),
    ({**HOULSBY, "stochastic_depth": float("nan")}, "stochastic_depth = nan.*must be a number"),
    ({**HOULSBY, "leave_out": ""}, "leave_out = .*numbers of layers"),
    ({**LORA, "output_lora": "no"}, "output_lora = no: must be true or false"),
    ({**HOULSBY, "a_new_switch": True}, "a_new_switch = True: is not known here, so it must be off"),
    ({"architecture": "union", "configs": []}, "architecture = union"),
    ({"architecture": "prefix_tuning"}, "architecture = prefix_tuning"),
    ({**LORA, "composition_mode": "scale"}, "composition_mode = scale"),
    ({**LORA, "use_dora": True}, "use_dora = True"),
    ({**LORA, "use_gating": True}, "use_gating = True"),
    ({**LORA, "vera_d": 0.1}, "vera_d = 0.1"),
    ({**LORA, "r": 0}, "r = 0"),
    ({**LORA, "r": "4"}, "r = 4"),
    ({**LORA, "alpha": None}, "alpha = None"),
    ({**LORA, "attn_matrices": ["o"]}, "attn_matrices = "),
    ({**LORA, "attn_matrices": [["q"]]}, "attn_matrices = "),
    ({**LORA, "attn_matrices": []}, "selfattn_lora = None"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"file: {message}"):
        read(config)


def test_other_nonsense() -> None:
    with pytest.raises(CheckpointError, match="config = None: must be a mapping"):
        from_config({"config": None}, 3, "file")
    with pytest.raises(CheckpointError, match="hidden_size = wide"):
        read(HOULSBY, hidden_size="wide")


def test_what_only_training_knows_is_noted() -> None:
    adapter, notes = read({**HOULSBY, "dropout": 0.1}, name="sst-2")
    assert adapter.name == "sst-2"
    assert any("dropout = 0.1 is not taken over" in note for note in notes)
    assert len(notes) == 1


def test_names_that_no_submodule_can_have() -> None:
    for name, new in (("train", "train_"), ("a.b/c", "a_b_c"), ("_modules", "_modules_"), ("ä 2", "ä 2")):
        adapter, notes = read(HOULSBY, name=name)
        assert adapter.name == new
        assert notes == (
            [f"the adapter's name {name!r} is {new!r} here: the other cannot be a submodule's"] * (new != name)
        )
    for wrong in (None, "", 3, ["a"]):
        with pytest.raises(CheckpointError, match="name = .*must be the adapter's name"):
            read(HOULSBY, name=wrong)


@pytest.mark.parametrize(
    "config", [HOULSBY, PFEIFFER, PARALLEL, LORA, {**LORA, "alpha": 1.5}, {**HOULSBY, "scaling": 0.3}]
)
def test_there_and_back(config: dict[str, Any]) -> None:
    adapter, _ = read(config)
    places = {
        "houlsby": ["attention.output", "output"],
        "lora": ["attention.self.query", "attention.self.value"],
    }.get(adapter.kind, ["output"])
    written = to_config(adapter, places, [], 32, adapter.bottleneck)
    assert {key: written[key] for key in config} == config
    assert all(type(written[key]) is type(value) for key, value in config.items())
    assert read(written)[0] == adapter


def test_kinds_and_places_without_words() -> None:
    with pytest.raises(CheckpointError, match="adapter.kind = 'mam'"):
        to_config(AdapterConfig(kind="mam"), ["output"], [], 32, 4)
    with pytest.raises(CheckpointError, match="reaches attention.output.dense.*no LoRA there"):
        to_config(AdapterConfig(kind="lora"), ["attention.output.dense"], [], 32, 4)


@given(st.integers(1, 2048), st.integers(1, 4096))
@example(16, 5)  # 16 / 5 as a float is more than that, and gives 4
def test_a_reduction_factor_gives_its_bottleneck(hidden: int, inner: int) -> None:
    factor = reduction_factor(hidden, inner)
    assert bottleneck_of(hidden, factor, "file") == inner
    assert (hidden % inner == 0) == isinstance(factor, int)
