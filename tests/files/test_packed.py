"""What is packed comes back exactly, takes the room it may take, and a lying file is found out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from peft_lightning.errors import CheckpointError
from peft_lightning.files.manifest import FORMAT, read_file, write_adapter
from peft_lightning.files.packed import pack, unpack

SELF = {"format": FORMAT, "class": "some.Method", "hyper_parameters": {}}


def houlsby(
    layers: int, width: int, inner: int, sparsity: float, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The state of a pruned Houlsby adapter, and a head."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for layer in range(layers):
        for block in ("attention.output", "output"):
            path = f"backbone.encoder.layer.{layer}.{block}.adapters.sparse"
            for name, shape in (("adapter_down.0", (inner, width)), ("adapter_up", (width, inner))):
                mask = torch.rand(shape, generator=generator) >= sparsity
                state[f"{path}.{name}.weight"] = (torch.randn(shape, generator=generator) * mask).to(dtype)
                state[f"{path}.{name}.bias"] = torch.randn(shape[0], generator=generator).to(dtype)
                state[f"{path}.{name}.weight_mask"] = mask
    state["head.dense.weight"] = torch.randn(width, width, generator=generator)
    state["head.out.bias"] = torch.zeros(2)
    return state


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype and given[name].shape == tensor.shape
        assert torch.equal(given[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_comes_back_exactly(dtype: torch.dtype) -> None:
    state = houlsby(3, 16, 5, 0.4, dtype)
    assert_same(unpack(pack(state)), state)


def test_without_masks_the_tensors_keep_their_names_on_the_disk() -> None:
    state = {name: t for name, t in houlsby(2, 8, 2, 0.0).items() if not name.endswith("_mask")}
    assert_same(load_safetensors(pack(state)), state)
    assert_same(unpack(pack(state)), state)


@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.8])
def test_size_of_a_deep_adapter(sparsity: float, tmp_path: Path) -> None:
    """The promise: (1 - s) x the prunable bytes + all other bytes + 1 bit per prunable weight + 16 KB."""
    state = houlsby(24, 64, 16, sparsity)
    manifest = {"format": FORMAT, "class": "x", "hyper_parameters": {"task": "mrpc"}}
    write_adapter(tmp_path, state, manifest)
    prunable = [state[name.removesuffix("_mask")] for name in state if name.endswith("_mask")]
    kept = sum(int(mask.sum()) for name, mask in state.items() if name.endswith("_mask"))
    weights = sum(tensor.numel() for tensor in prunable)
    other = sum(t.nbytes for t in state.values() if t.dtype != torch.bool) - 4 * weights
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert len(state) == 24 * 2 * 6 + 2
    assert written <= 4 * kept + other + weights / 8 + 16 * 1024
    assert_same(read_file(tmp_path)["state_dict"], state)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a.{}.b", "a.{}.c", "{}", "x{}y", "a.{}.7.w", "a.b.{}", "a.0{}.w"]),
            st.sampled_from([0, 1, 2, 5, 17]),
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from(["float32", "bfloat16", "int64", "bool"]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_any_names_shapes_and_dtypes(rows: list[tuple[str, int, list[int], str, bool]]) -> None:
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(len(rows))
    for pattern, number, shape, dtype, masked in rows:
        name = pattern.format(number)
        tensor = torch.randint(-3, 4, shape, generator=generator).to(getattr(torch, dtype))
        if masked:
            mask = torch.rand(shape, generator=generator) < 0.5
            state[f"{name}_mask"] = mask
            tensor = tensor * mask
        state[name] = tensor
    assert_same(unpack(pack(state)), state)


def test_a_weight_under_a_mask_is_never_lost() -> None:
    state = {"w": torch.tensor([1.0, 2.0, 3.0]), "w_mask": torch.tensor([True, False, True])}
    assert_same(unpack(pack(state)), state)
    state["w"][1] = float("nan")
    assert unpack(pack(state))["w"].isnan().tolist() == [False, True, False]


STATE = {
    "m.0.w": torch.tensor([1.0, 0.0, 3.0]),
    "m.0.w_mask": torch.tensor([True, False, True]),
    "m.1.w": torch.tensor([0.0, 5.0, 6.0]),
    "m.1.w_mask": torch.tensor([False, True, True]),
    "b": torch.ones(2),
}


def lying(change: Any) -> bytes:
    """The packed STATE after ``change(stored, index)``."""
    payload = pack(STATE)
    stored = load_safetensors(payload)
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    (key,) = header["__metadata__"]
    index = json.loads(header["__metadata__"][key])
    index = change(stored, index) or index
    text = index if isinstance(index, str) else json.dumps(index)
    return save_safetensors(stored, metadata={key: text})


def group(index: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(entry for entry in index if entry["names"][-1].endswith(name))


LIES: dict[str, tuple[Any, str]] = {
    "values missing": (lambda s, i: s.update({"values.float32": s["values.float32"][:-1]}), "values of torch.float32"),
    "values gone": (lambda s, i: [s.pop("values.float32"), i][1], "stored are none"),
    "values of another dtype": (lambda s, i: s.update({"values.float32": s["values.float32"].half()}), "float16"),
    "bits missing": (lambda s, i: s.update(bits=s["bits"][:0]), "6 mask bits"),
    "bits gone": (lambda s, i: [s.pop("bits"), i][1], "mask bits, stored are none"),
    "one bit more": (lambda s, i: s.update(bits=s["bits"] | 128 | 64), "values of torch.float32"),
    "something more": (lambda s, i: s.update(more=torch.ones(1)), "does not speak of more"),
    "larger shape": (lambda s, i: group(i, "b").update(shape=[3]), "values of torch.float32"),
    "endless shape": (lambda s, i: group(i, "b").update(shape=[10**9] * 9), "values of torch.float32"),
    "negative shape": (lambda s, i: group(i, "b").update(shape=[-2]), "malformed"),
    "a shape of words": (lambda s, i: group(i, "b").update(shape=["2"]), "malformed"),
    "a shape that is true": (lambda s, i: group(i, "b").update(shape=[True, 2]), "malformed"),
    "too many layers": (lambda s, i: group(i, ".w").update(layers=[[0, 300_000]]), "more than 200000 tensors"),
    "endless layers": (lambda s, i: group(i, ".w").update(layers=[[0, 10**12]]), "malformed"),
    "backward layers": (lambda s, i: group(i, ".w").update(layers=[[2, 0]]), "malformed"),
    "a name twice": (lambda s, i: i + [group(i, "b")], "names a tensor twice"),
    "an unknown dtype": (lambda s, i: group(i, "b").update(dtype="complex64"), "malformed"),
    "a masked mask": (lambda s, i: group(i, "_mask").update(masked=True), "malformed"),
    "no mask": (lambda s, i: group(i, "b").update(masked=True), "b has no mask of its shape"),
    "an unknown field": (lambda s, i: group(i, "b").update(code="import os"), "malformed"),
    "no list": (lambda s, i: {"a": 1}, "no list"),
    "no JSON": (lambda s, i: "[", "Expecting value"),
    "a deep nest": (lambda s, i: "[" * 200_000, "nested too deeply"),
    "a huge number": (lambda s, i: json.dumps(i).replace("[2]", "[" + "9" * 10_000 + "]"), "Exceeds the limit"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_is_refused(lie: str, tmp_path: Path) -> None:
    change, message = LIES[lie]
    payload = lying(change)
    write_adapter(tmp_path, STATE, SELF)
    (tmp_path / "adapter.safetensors").write_bytes(payload)
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_file(tmp_path)
    described = {**SELF, "sha256": hashlib.sha256(payload).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=f"damaged or incomplete adapter.*({message})"):
        read_file(tmp_path)


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    write_adapter(tmp_path, STATE, SELF)
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        (tmp_path / "adapter.safetensors").write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="damaged or incomplete adapter"):
            read_file(tmp_path)
