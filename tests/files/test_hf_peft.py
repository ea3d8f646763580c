"""PEFT's LoRA configuration: what is read, in that library's sense, and what is refused by name."""

from __future__ import annotations

import doctest
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files import hf_peft, hf_peft_patterns
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft import read_peft, write_peft
from peft_lightning.files.hf_peft_config import claimed_sites, target_modules
from peft_lightning.files.hf_peft_patterns import rank_settings, whole_modules
from peft_lightning.layers.adapters import AdapterConfig

PLACES = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
          "intermediate.dense", "output.dense")  # fmt: skip
LINEARS = [f"encoder.layer.{i}.{place}" for i in range(12) for place in PLACES]


def tensors(places: tuple[str, ...] = PLACES[::2][:2], layers: int = 2, name: str = "sparse") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"encoder.layer.{i}.{place}.loras.{name}.{matrix}": torch.randn(shape, generator=generator)
        for i in range(layers)
        for place in places
        for matrix, shape in (("lora_A", (4, 8)), ("lora_B", (8, 4)))
    }


def adapter(**changes: Any) -> ForeignAdapter:
    values: dict[str, Any] = {
        "adapter": AdapterConfig(kind="lora", bottleneck=4, scaling=2.0),
        "tensors": tensors(),
        "base": {"model_type": "roberta", "model_name": "tiny", "model_class": "RobertaModel"},
    }
    return ForeignAdapter(**{**values, **changes})


HEAD = {
    "dense.weight": torch.randn(8, 8),
    "dense.bias": torch.randn(8),
    "out.weight": torch.randn(2, 8),
    "out.bias": torch.randn(2),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path / "a", adapter(), LINEARS)
    return tmp_path / "a"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_written_and_read_again(folder: Path) -> None:
    given = read_peft(folder)
    assert (given.adapter.kind, given.adapter.bottleneck, given.adapter.scaling) == ("lora", 4, 2.0)
    assert_same(given.tensors, tensors())
    assert given.head is None and given.masks == {} and given.notes == ()
    names = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight" in names


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_heads_travel_under_the_names_of_a_sequence_classifier(model_type: str, tmp_path: Path) -> None:
    base = {**adapter().base, "model_type": model_type}
    write_peft(tmp_path, adapter(head=HEAD, base=base), LINEARS)
    given = read_peft(tmp_path)
    assert given.head is not None
    assert_same(given.head, HEAD)
    assert given.base["prefix"] == model_type and not given.base["pooler"]
    assert read_peft(tmp_path, with_head=False).head is None


def test_a_head_that_stands_on_the_base_models_pooler(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter(head=HEAD, base={**adapter().base, "model_type": "bert"}), LINEARS)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "pooler" not in name}, path)
    given = read_peft(tmp_path)
    assert given.base["pooler"] and given.head is not None and given.head.keys() == {"out.weight", "out.bias"}


def test_heads_that_are_not_ours(folder: Path, tmp_path: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.score.weight": torch.ones(2, 8)}, path)
    with pytest.raises(CheckpointError, match="beside LoRA it holds score.weight.*--new_head"):
        read_peft(folder)
    assert read_peft(folder, with_head=False).head is None
    linear = {name: tensor for name, tensor in HEAD.items() if name.startswith("out")}
    for changes in ({"head": linear}, {"head": HEAD, "base": {**adapter().base, "model_type": "electra"}}):
        with pytest.raises(CheckpointError, match="takes the head of roberta and bert with head = 'dense' only"):
            write_peft(tmp_path / "b", adapter(**changes), LINEARS)
    with pytest.raises(CheckpointError, match="adapter.kind = 'houlsby': PEFT's format is for lora only"):
        write_peft(tmp_path / "b", adapter(adapter=AdapterConfig()), LINEARS)


def test_masks_travel_beside_the_zeros_whatever_the_name(tmp_path: Path) -> None:
    state = tensors(name="mine")
    masks = {name: torch.rand(tensor.shape) < 0.5 for name, tensor in state.items()}
    state = {name: tensor * masks[name] for name, tensor in state.items()}
    named = AdapterConfig(kind="lora", bottleneck=4, scaling=2.0, name="mine")
    write_peft(tmp_path, adapter(adapter=named, tensors=state, masks=masks), LINEARS)
    given = read_peft(tmp_path)
    assert_same(given.masks, {name.replace(".mine.", ".sparse."): mask for name, mask in masks.items()})
    assert_same(given.tensors, {name.replace(".mine.", ".sparse."): tensor for name, tensor in state.items()})


def test_scalings(folder: Path) -> None:
    edit(folder, lora_alpha=6)
    assert read_peft(folder).adapter.scaling == 1.5
    edit(folder, use_rslora=True)
    assert read_peft(folder).adapter.scaling == 6 / math.sqrt(4)
    edit(folder, use_rslora=False, r=99, rank_pattern={"query": 4, r"layer\.\d+\.attention\.self\.value": 4})
    assert read_peft(folder).adapter.bottleneck == 4
    edit(folder, alpha_pattern={"query": 6, "value": 6}, lora_alpha=1)
    assert read_peft(folder).adapter.scaling == 1.5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type = IA3"),
    ({"use_dora": True}, "use_dora = True"),
    ({"bias": "all"}, "bias = all"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
    ({"init_lora_weights": "olora"}, "init_lora_weights = olora"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = "),
    ({"trainable_token_indices": [1]}, "trainable_token_indices = "),
    ({"use_qalora": True}, "use_qalora = True"),
    ({"a_new_switch": "on"}, "a_new_switch = on: is not known here, so it must be off"),
    ({"rank_pattern": {"query": 2}}, "rank_pattern = .*the same value for all modules"),
    ({"alpha_pattern": {"query": 2}}, "alpha_pattern = .*the same value for all modules"),
    ({"alpha_pattern": {"(": 2}}, "alpha_pattern = .*not a regular expression"),
    ({"rank_pattern": {"(([a-z.0-9]+)+)+!": 4}}, "rank_pattern = .*may take too long to match"),
    ({"use_rslora": "no"}, "use_rslora = no: must be true or false"),
    ({"use_dora": 0}, "use_dora = 0.*must be False or None"),
    ({"fan_in_fan_out": 0}, "fan_in_fan_out = 0"),
    ({"lora_dropout": "x"}, "lora_dropout = x: must be a number"),
    ({"lora_dropout": float("nan")}, "lora_dropout = nan: must be a number"),
    ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    ({"target_modules": [3]}, "target_modules = .*must be text or a list of texts"),
    ({"modules_to_save": 3}, "modules_to_save = 3: must be a list of texts"),
    ({"layers_to_transform": True}, "layers_to_transform = True: must be a number of a layer"),
    ({"auto_mapping": ["x"]}, "auto_mapping = .*must be a mapping"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path = 3: must be text"),
    ({"rank_pattern": [1]}, "rank_pattern = .*a mapping of regular expressions"),
    ({"r": 0}, "r = 0"),
    ({"r": "4"}, "r = 4"),
    ({"r": True}, "r = True"),
    ({"r": 3}, "r = 3, but 4 modules differ"),
    ({"lora_alpha": None}, "lora_alpha = None"),
    ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(change: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **change)
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        read_peft(folder)


def test_a_file_without_a_class_is_noted(folder: Path, tmp_path: Path) -> None:
    edit(folder, auto_mapping=None)
    assert "the file does not say which architecture" in read_peft(folder).notes[0]
    assert read_peft(folder).base["model_name"] == "tiny"
    edit(folder, auto_mapping={"base_model_class": None})
    assert len(read_peft(folder).notes) == 1
    write_peft(tmp_path / "b", adapter(head=HEAD), LINEARS)
    assert read_peft(tmp_path / "b").notes == ()  # its names begin with the architecture's


def test_values_that_are_not_finite(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    name = "base_model.model.encoder.layer.1.attention.self.value.lora_B.weight"
    state[name][0, 0] = float("inf")
    save_file(state, path)
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        read_peft(folder)


def test_facts_of_the_base_model_are_checked_before_the_rest_is_read(folder: Path) -> None:
    edit(folder, r=3)
    facts: list[dict[str, Any]] = []
    with pytest.raises(CheckpointError, match="r = 3, but"):
        read_peft(folder, check=facts.append)
    assert facts[0]["hidden_size"] == 8 and facts[0]["class"] == "RobertaModel"


def test_matrices_that_are_none(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.flatten() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"r = 4, but 4 modules differ: .*A .32,., B .32,."):
        read_peft(folder)


def test_names_too_long_to_be_matched(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    long = f"base_model.model.encoder.layer.0.{'a' * 1000}.lora_A.weight"
    save_file({**load_file(path), long: torch.ones(4, 8)}, path)
    with pytest.raises(CheckpointError, match="so long a name is no path"):
        read_peft(folder)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern"])
def test_expressions_that_could_match_for_ever(key: str) -> None:
    endless = "(([a-z.0-9]+)+)+!"
    rule: dict[str, Any] = {"target_modules": ["query"], "layers_to_transform": [0], "prefix": ""}
    rule[key] = [endless] if key == "modules_to_save" else endless
    with pytest.raises(
        CheckpointError, match=f"choice of modules cannot be read .{key} = .*may take too long to match"
    ):
        claimed_sites(rule, LINEARS)


def test_dropout_is_noted(folder: Path) -> None:
    edit(folder, lora_dropout=0.1)
    assert read_peft(folder).notes == ("lora_dropout = 0.1 is not taken over",)


def test_tensors_of_something_else(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    save_file({**state, "x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="x: every tensor's name must start with base_model.model."):
        read_peft(folder)
    save_file({**state, "base_model.model.bert.output.dense.lora_A.weight": torch.ones(4, 8)}, path)
    with pytest.raises(CheckpointError, match="tensors are in bert, encoder; must be in one model"):
        read_peft(folder)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="tensors are in no module"):
        read_peft(folder)
    save_file(
        {name: tensor for name, tensor in state.items() if "layer.1.attention.self.value.lora_B" not in name}, path
    )
    with pytest.raises(CheckpointError, match=r"1 modules differ: encoder.layer.1.*B missing"):
        read_peft(folder)


def test_pickles_only_on_request(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        UsageError, match="adapter_model.bin: is a pickle, which import and merge read with --allow_bin"
    ):
        read_peft(folder)
    assert_same(read_peft(folder, allow_bin=True).tensors, tensors())


RULES: list[dict[str, Any]] = [
    {"target_modules": ["query", "value"]},
    {"target_modules": ["dense"]},
    {"target_modules": ["output.dense", "encoder.layer.3.attention.self.key"]},
    {"target_modules": r".*\.(query|key)"},
    {"target_modules": r".*layer\.[0-5]\.attention\.output\.dense"},
    {"target_modules": ["query"], "layers_to_transform": [0, 11]},
    {"target_modules": ["query"], "layers_to_transform": 1},
    {"target_modules": ["query"], "layers_to_transform": [2], "layers_pattern": "layer"},
    {"target_modules": ["query"], "layers_to_transform": [2], "layers_pattern": ["h", "layer"]},
    {"target_modules": ["query"], "layers_to_transform": []},
    {"target_modules": ["dense"], "exclude_modules": ["attention.output.dense"]},
    {"target_modules": ["dense"], "exclude_modules": r".*intermediate.*"},
    {"target_modules": ["dense"], "modules_to_save": ["intermediate"]},
]


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_modules_are_chosen_as_that_library_chooses_them(rule: dict[str, Any], prefix: str) -> None:
    config = SimpleNamespace(
        **{"exclude_modules": None, "modules_to_save": None, "target_parameters": None, "layers_to_transform": None}
        | {"layers_pattern": None}
        | rule
    )
    chosen = {path for path in LINEARS if check_target_module_exists(config, prefix + path)}
    excluded = {p for p in chosen if type(check_target_module_exists(config, prefix + p)).__name__ == "_ExcludedModule"}
    assert claimed_sites({**rule, "prefix": prefix}, LINEARS) == chosen - excluded
    assert chosen


def test_a_choice_that_cannot_be_read() -> None:
    with pytest.raises(CheckpointError, match="the choice of modules cannot be read"):
        claimed_sites({"target_modules": "(", "prefix": ""}, LINEARS)
    with pytest.raises(CheckpointError, match="the choice of modules cannot be read"):
        claimed_sites({"target_modules": 3, "prefix": ""}, LINEARS)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (PLACES[:1], ["query"]),
        (("output.dense",), [f"{i}.output.dense" for i in range(12)]),
        (("attention.output.dense",), ["attention.output.dense"]),
        (("intermediate.dense", "output.dense", "attention.output.dense"), ["dense"]),
    ],
)
def test_the_shortest_exact_names(places: tuple[str, ...], expected: list[str]) -> None:
    sites = [path for path in LINEARS if path.split(".", 3)[3] in places]
    written = target_modules(sites, set(LINEARS))
    assert sorted(written) == sorted(expected)
    assert claimed_sites({"target_modules": written, "prefix": ""}, LINEARS) == set(sites)


RANKS = {f"layer.{i}.query": rank for i, rank in ((1, 4), (2, 8), (11, 4), (12, 2), (21, 8), (111, 4))}


@pytest.mark.parametrize("prefix", ["", "bert.encoder."])
def test_patterns_give_every_module_its_own_rank(prefix: str) -> None:
    ranks = {f"{prefix}{path}": rank for path, rank in RANKS.items()}
    settings = rank_settings(ranks, 0.75)
    assert (settings["r"], settings["lora_alpha"]) == (4, 3)
    for path, rank in ranks.items():
        found = {
            name: settings[f"{name}_pattern"].get(get_pattern_key(settings[f"{name}_pattern"], path), settings[usual])
            for name, usual in (("rank", "r"), ("alpha", "lora_alpha"))
        }
        assert found == {"rank": rank, "alpha": rank * 0.75}
        # a model inside of another one is not meant
        assert get_pattern_key(settings["rank_pattern"], f"outer.{path}") == f"outer.{path}"
    assert rank_settings({"a": 8, "b": 4}, 1 / 3) == {
        "r": 4,
        "lora_alpha": 4 / 3,
        "rank_pattern": {"^a": 8},
        "alpha_pattern": {"^a": 8 / 3},
    }


def test_whole_modules_are_named_so_that_no_other_is_meant() -> None:
    modules = ["norm", "layers.0.input_layernorm", "layers.0.mlp", "layers.0.q_norm"]
    norms = [path for path in modules if path.endswith("norm")]
    assert whole_modules(norms, modules) == sorted(norms)
    assert whole_modules([], modules) == []
    with pytest.raises(CheckpointError, match=r"cannot name norm, ... without layers.0.input_layernorm, layers.0"):
        whole_modules(["norm"], modules)


def test_varied_ranks_and_norms_are_written(tmp_path: Path) -> None:
    state = tensors()
    small = {name: tensor for name, tensor in state.items() if name.startswith("encoder.layer.0.")}
    state |= {name: (t[:2] if name.endswith("A") else t[:, :2]).contiguous() for name, t in small.items()}
    norm = {f"encoder.layer.0.output.LayerNorm.{kind}": torch.ones(8) for kind in ("weight", "bias")}
    for head, prefix in ((None, ""), (HEAD, "roberta.")):
        out = tmp_path / f"out{prefix}"
        write_peft(out, adapter(tensors=state, head=head), [*LINEARS, "encoder.layer.0.output.LayerNorm"], norm)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 4)
        sites = {f"{prefix}{name.partition('.loras')[0]}" for name in state if name not in small}
        assert set(config["rank_pattern"]) == {f"^{re.escape(site)}" for site in sites}
        assert set(config["rank_pattern"].values()) == {4} and set(config["alpha_pattern"].values()) == {8}
        saved = [f"{prefix}encoder.layer.0.output.LayerNorm"]
        assert config["modules_to_save"] == (saved if head is None else [*saved, "classifier"])
        written = load_file(out / "adapter_model.safetensors")
        assert f"base_model.model.{prefix}encoder.layer.0.output.LayerNorm.bias" in written


def test_a_pruned_models_lora_is_not_read_as_a_whole_ones(folder: Path) -> None:
    (folder / "pruned.json").write_text("{}")
    with pytest.raises(UsageError, match="is LoRA for a pruned model; load_pruned.. gives the model, and PEFT adds"):
        read_peft(folder)


def test_examples_in_the_docstrings() -> None:
    for module in (hf_peft, hf_peft_patterns):
        assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
