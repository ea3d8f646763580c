"""From folders of any format to one merged adapter that reloads, with its recipe; what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_lightning import MergeConfig, Task, TaskDataModule, load, merge_adapters
from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.errors import CheckpointError, DataError, UsageError
from peft_lightning.exchange import ExchangeWarning, import_adapter
from peft_lightning.files.sources import read_source
from peft_lightning.layers import merging
from peft_lightning.layers.merging import MergeSource
from tests.reference.calibration import alone
from tests.sources import backbone_folder, hidden, module, written
from tests.toy import data

TEXTS = ["the cat sleeps", "this red dog is not lazy", "fish", "the tiny horse looks brave"] * 10
LEFT = "ignore:.*:peft_lightning.exchange.notes.ExchangeWarning"
OTHER = Task(name="other", text=("text",), kind="classify", labels=("no", "perhaps", "yes"), metrics=("accuracy",))


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return backbone_folder(tmp_path / "backbone")


@pytest.fixture
def family(backbone: str, tmp_path: Path) -> list[Path]:
    """Three adapters of other widths, in folders of AdapterHub's, ours, and a checkpoint beside a run's."""
    made = [module(backbone, number, bottleneck=4 + number, kind="houlsby") for number in range(3)]
    formats = ("adapterhub", "peft_lightning", "adapterhub")
    return [written(tmp_path / f"source_{i}", one, formats[i]) for i, one in enumerate(made)]


def merged(adapters: Any, output: Path, backbone: str, preset: str = "acts+", **options: Any) -> dict[str, Any]:
    fields = ("weights", "scale", "tokens", "streams", "recipe")
    merge = {"preset": preset, "tokens": 100, **{name: options.pop(name) for name in fields if name in options}}
    with pytest.warns(ExchangeWarning):
        return merge_adapters(adapters, output, backbone=backbone, merge=merge, max_length=16, **options)


def reloaded(folder: Path, backbone: str) -> Any:
    with pytest.warns(ExchangeWarning, match="the head is new"):
        return import_adapter(folder, task="toy_sentiment", backbone=backbone)


def bare(backbone: str) -> Any:
    return build_backbone(BackboneConfig(name=backbone)).eval()


# -- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["sum", "avg", "wts", "acts", "acts+", "select"])
def test_the_merged_folder_reloads_and_computes_what_was_merged(
    preset: str, family: list[Path], backbone: str, tmp_path: Path
) -> None:
    record = merged(family, tmp_path / "out", backbone, preset, data=TEXTS)
    back = reloaded(tmp_path / "out", backbone)
    assert (back.adapter.kind, back.adapter.bottleneck, back.adapter.factor) == ("houlsby", 6, 1.0)
    sources = []
    for number, path in enumerate(family):
        given = read_source(path)
        sources.append(MergeSource(name=f"source_{number}", adapter=given.adapter, tensors=given.tensors))
    inputs = _tokens(TEXTS, backbone)
    wanted = merging.merge_adapters(bare(backbone), sources, MergeConfig(preset=preset, tokens=100), lambda: inputs)
    assert_close(hidden(back), hidden(alone(bare(backbone), wanted)[0]), rtol=0, atol=1e-6)
    assert {key: record[key] for key in ("sites", "recipe", "weights", "tokens")} == {
        key: wanted.report[key] for key in ("sites", "recipe", "weights", "tokens")
    }
    first = load_file(tmp_path / "out" / "adapter.safetensors")
    assert all(torch.equal(tensor, wanted.tensors[name]) for name, tensor in first.items())


def _tokens(texts: list[str], backbone: str) -> list[Any]:
    """Batches of 8 texts, as the merge reads them."""
    from peft_lightning.backbones.tokenizers import load_tokenizer

    words = load_tokenizer(backbone)
    chunks = [texts[start : start + 8] for start in range(0, len(texts), 8)]
    return [words(chunk, padding=True, truncation=True, max_length=16, return_tensors="pt") for chunk in chunks]


def test_the_record_names_everything_that_went_in(family: list[Path], backbone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    returned = merged(family, out, backbone, data=TEXTS, weights=[1.0, 2.0, 1.0], recipe={"ridge": 0.01})
    text = (out / "merge.json").read_text()
    record = json.loads(text)
    assert record == returned and "NaN" not in text and "Infinity" not in text
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter.safetensors",
        "merge.json",
        "merge.png",
    }
    for number, (source, path) in enumerate(zip(record["sources"], family, strict=True)):
        digest = hashlib.sha256((path / "adapter.safetensors").read_bytes()).hexdigest()
        assert source["name"] == f"source_{number}" and source["files"] == {"adapter.safetensors": digest}
        assert (source["kind"], source["bottleneck"], source["nonlinearity"]) == ("houlsby", 4 + number, "relu")
    assert (record["sources"][1]["seed"], record["sources"][1]["task"]) == (1, "toy_sentiment")
    assert record["recipe"]["ridge"] == 0.01 and record["recipe"]["repair"] == "refit"
    assert record["weights"] == [1.0, 2.0, 1.0] and record["outputs"] == [0.25, 0.5, 0.25]
    assert record["data"]["sha256"] == hashlib.sha256("\n".join(TEXTS).encode()).hexdigest()
    assert record["data"]["texts"] == 40 and record["tokens"] >= 100 and record["streams"] == "own"
    assert record["backbone"]["model_type"] == "bert" and record["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in text  # a folder's place on this machine is nobody else's business
    assert len(record["sites"]) == 6
    for site in record["sites"].values():
        assert len(site["cost"]) == len(site["cosine"]) == 3 and site["norm_ratio"] > 0 and site["output_error"] > 0
        assert site["reference"].startswith("source_")
    with Image.open(out / "merge.png") as picture:
        assert picture.format == "PNG" and picture.width > 3 * 400


def test_one_note_names_the_adapters_whose_backbones_weights_nobody_knows(
    family: list[Path], backbone: str, tmp_path: Path
) -> None:
    """AdapterHub's files say of which shape it was; ours of which weights, too."""
    record = merged(family, tmp_path / "out", backbone, "avg")
    assert [source["knows_weights"] for source in record["sources"]] == [False, True, False]
    notes = [note for note in record["notes"] if "weights" in note]
    assert notes == ["source_0, source_2: made on weights that no file identifies; only the shapes were compared"]
    merged([family[1]], tmp_path / "own", backbone, "avg")
    assert "no file identifies" not in (tmp_path / "own" / "merge.json").read_text()


def test_two_merges_write_the_same_bytes(family: list[Path], backbone: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        merged(family, tmp_path / name, backbone, data=TEXTS)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_data_module_gives_its_rows_without_labels(family: list[Path], backbone: str, tmp_path: Path) -> None:
    rows = {"train": [{"text": text} for text in TEXTS]}  # none of them has a label
    source = TaskDataModule(task="toy_sentiment", tokenizer=backbone, rows=rows, batch_size=4, max_length=16)
    record = merged(family, tmp_path / "out", backbone, "acts", data=source)
    assert record["data"]["task"] == "toy_sentiment" and record["data"]["rows"] == 40
    assert record["data"]["split"] == "train" and record["data"]["batch_size"] == 4 and record["tokens"] >= 100
    validation = merged(family, tmp_path / "other", backbone, "acts", data=data(max_length=16), split="validation")
    with pytest.raises(UsageError, match="split = 'dev': must be train, validation or test"):
        merge_adapters(family, tmp_path / "dev", backbone=backbone, data=source, split="dev")
    assert validation["data"]["split"] == "validation" and validation["data"]["rows"] == 256


@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize("format", [None, "peft", "adapterhub", "peft_lightning"])
def test_lora_goes_out_in_every_format(format: str | None, backbone: str, tmp_path: Path) -> None:
    made = [module(backbone, number, kind="lora", bottleneck=2, scaling=0.5 + number) for number in range(2)]
    paths = [written(tmp_path / "a", made[0], "peft"), written(tmp_path / "b", made[1])]
    record = merge_adapters(
        paths, tmp_path / "out", backbone=backbone, merge={"preset": "cat"}, format=format, task="toy_sentiment"
    )
    assert record["format"] == (format or "peft") and record["data"] is None
    back = load(tmp_path / "out") if format == "peft_lightning" else reloaded(tmp_path / "out", backbone)
    assert (back.adapter.bottleneck, back.adapter.factor) == (4, 1.0)
    one, other = bare(backbone), bare(backbone)
    for name, layer in back.adapters.items():
        layer.merge(one.get_submodule(name.partition(".loras.")[0]))
        site = other.get_submodule(name.partition(".loras.")[0])
        with torch.no_grad():
            for source in made:
                part = source.adapters[name.replace(back.adapter.name, "sparse")]
                site.weight += 0.5 * part.scaling * part.lora_B @ part.lora_A
    assert_close(hidden(one), hidden(other), rtol=0, atol=1e-6)
    assert (tmp_path / "out" / "merge.png").stat().st_size > 1000


@pytest.mark.filterwarnings(LEFT)
def test_sparse_adapters_keep_masks_in_the_file(backbone: str, tmp_path: Path) -> None:
    made = [module(backbone, number, prune={"score": "random", "sparsity": 0.7}) for number in range(2)]
    paths = [written(tmp_path / str(i), one) for i, one in enumerate(made)]
    merge_adapters(paths, tmp_path / "out", backbone=backbone, merge={"preset": "avg"})
    back = reloaded(tmp_path / "out", backbone)
    assert back.prune.score == "given" and 0.4 < back.summary()["kept_share"] < 0.6  # 1 - 0.7 ** 2 = 0.51
    for name, parameter in back.prunable().items():
        masks = [one.prunable()[name.replace(".merged.", ".sparse.")].mask for one in made]
        assert torch.equal(parameter.mask, masks[0] | masks[1])


@pytest.mark.filterwarnings(LEFT)
def test_other_architectures_go_out_as_our_own_with_a_new_head(tmp_path: Path) -> None:
    electra = backbone_folder(tmp_path / "electra", "electra", embedding_size=8)
    paths = [written(tmp_path / str(i), module(electra, i), "peft_lightning") for i in range(2)]
    options: dict[str, Any] = {"backbone": electra, "merge": {"preset": "wts"}}
    with pytest.raises(UsageError, match=r"format = 'peft_lightning': holds a module with a head, so it needs a task"):
        merge_adapters(paths, tmp_path / "out", **options)
    with pytest.raises(UsageError, match="is written for bert and roberta only, and the backbone is a electra"):
        merge_adapters(paths, tmp_path / "out", format="adapterhub", **options)
    assert not (tmp_path / "out").exists()
    record = merge_adapters(paths, tmp_path / "out", task="toy_sentiment", **options)
    back = load(tmp_path / "out")
    assert record["format"] == "peft_lightning" and back.predict(["the cat sleeps"])[0]["label"] in back.task.labels
    again = merge_adapters([tmp_path / "out"], tmp_path / "again", task="toy_sentiment", **options)
    assert again["sources"][0]["method"] == "SparseAdapterModule"
    assert torch.equal(hidden(load(tmp_path / "again")), hidden(back))


# -- heads ----------------------------------------------------------------------------------------------------------


def test_heads_stay_behind_with_a_note(family: list[Path], backbone: str, tmp_path: Path) -> None:
    with pytest.warns(ExchangeWarning, match="the heads of source_0, source_1, source_2 stay behind"):
        record = merge_adapters(family, tmp_path / "out", backbone=backbone, merge={"preset": "avg"})
    assert record["head"] is None and not (tmp_path / "out" / "head_config.json").exists()
    with pytest.warns(ExchangeWarning, match="the head of source_0 stays behind"):
        merge_adapters(family[:1], tmp_path / "one", backbone=backbone, merge={"preset": "avg"})


@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize("format", ["adapterhub", "peft_lightning"])
def test_one_head_goes_along_where_all_mean_the_same(
    format: str, family: list[Path], backbone: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"backbone": backbone, "merge": {"preset": "avg"}, "task": "toy_sentiment"}
    merge_adapters(family, tmp_path / "out", head="source_1", format=format, **options)
    back = (
        load(tmp_path / "out")
        if format == "peft_lightning"
        else import_adapter(tmp_path / "out", task="toy_sentiment", backbone=backbone)
    )
    wanted = load(family[1]).head.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in back.head.state_dict().items())


def test_heads_for_other_labels_are_refused(family: list[Path], backbone: str, tmp_path: Path) -> None:
    three = module(backbone, 5, task=OTHER, kind="houlsby", bottleneck=4)
    paths = [family[0], written(tmp_path / "three", three)]
    options: dict[str, Any] = {"backbone": backbone, "merge": {"preset": "avg"}}
    with pytest.raises(UsageError, match="the head of three no, perhaps, yes; what adapters for other labels become"):
        merge_adapters(paths, tmp_path / "out", head="source_0", **options)
    with pytest.raises(UsageError, match="head = 'source_2': must be one of source_0, three"):
        merge_adapters(paths, tmp_path / "out", head="source_2", **options)
    lora = [written(tmp_path / "lora", module(backbone, 0, kind="lora"), "peft")]
    with pytest.raises(UsageError, match="head = 'lora': this adapter has no head"):
        merge_adapters(lora, tmp_path / "out", head="lora", backbone=backbone, merge={"preset": "svd"})
    assert not (tmp_path / "out").exists()


# -- refusals -------------------------------------------------------------------------------------------------------


def test_data_only_where_the_method_needs_it(family: list[Path], backbone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for preset in ("acts", "acts+", "select"):
        with pytest.raises(UsageError, match=r"needs unlabelled data for activations; give data \(--data TASK or"):
            merge_adapters(family, out, backbone=backbone, merge={"preset": preset})
    lora = [written(tmp_path / "lora", module(backbone, 0, kind="lora"), "peft")]
    with pytest.raises(UsageError, match="LoRA's updates are merged without data; leave it out"):
        merge_adapters(lora, out, backbone=backbone, merge={"preset": "svd"}, data=TEXTS)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "data: there is no text"),
        ("the cat", {}, "must be a TaskDataModule or a list of texts, not str"),
        ([1, 2], {}, "must be a TaskDataModule or a list of texts, not list"),
        (TEXTS, {"batch_size": 0}, "batch_size = 0, max_length = 16: must be at least 1"),
        (TEXTS, {"max_length": 41}, "max_length = 41: the backbone has 40 positions"),
    ]
    for given, options, message in cases:
        with pytest.raises(UsageError, match=message):
            merge_adapters(family, out, backbone=backbone, data=given, **{"max_length": 16, **options})
    source = TaskDataModule(task="toy_sentiment", tokenizer=backbone, rows={"train": [{"text": 3}]}, max_length=16)
    with pytest.raises(DataError, match="is not a text"):
        merge_adapters(family, out, backbone=backbone, data=source)
    assert not out.exists()


def test_wrong_options(family: list[Path], backbone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"format": "onnx"}, "format = 'onnx': must be one of adapterhub, peft, peft_lightning"),
        ({"format": "peft"}, "format = 'peft': is for LoRA, and the adapters are of kind houlsby"),
        (
            {"merge": {"preset": "avg", "wights": [1]}},
            r"no option 'wights' \(did you mean 'weights'",
        ),
        ({"merge": {"preset": "cat"}}, "merge.preset = 'cat': is for LoRA"),
        ({"merge": {"preset": "avg", "weights": [1.0]}}, "must be 3, one for each adapter"),
    ]
    for options, message in cases:
        with pytest.raises(UsageError, match=message):
            merge_adapters(family, out, **{"backbone": backbone, "merge": {"preset": "avg"}, **options})
    with pytest.raises(UsageError, match="adapters: must be at least one folder"):
        merge_adapters([], out, backbone=backbone)
    assert not out.exists()
    out.mkdir()
    (out / "kept").write_text("mine")
    with pytest.raises(UsageError, match="exists already and is not empty"):
        merge_adapters(family, out, backbone=backbone, merge={"preset": "avg"})
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_adapters_of_other_backbones_and_kinds(family: list[Path], backbone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    deeper = backbone_folder(tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match="source_0: belongs to another backbone .*num_hidden_layers 3 here 4"):
        merge_adapters(family, out, backbone=deeper, merge={"preset": "avg"})
    gelu = written(tmp_path / "gelu", module(backbone, 0, kind="houlsby", nonlinearity="gelu"))
    with pytest.raises(UsageError, match="adapter.nonlinearity: source_0 has 'relu', gelu has 'gelu'"):
        merge_adapters([family[0], gelu], out, backbone=backbone, merge={"preset": "avg"})
    pfeiffer = written(tmp_path / "pfeiffer", module(backbone, 0))
    with pytest.raises(UsageError, match="adapter.kind: source_0 has 'houlsby', pfeiffer has 'pfeiffer'"):
        merge_adapters([family[0], pfeiffer], out, backbone=backbone, merge={"preset": "avg"})
    assert not out.exists()


def test_layers_that_are_left_out_are_so_in_all_adapters(backbone: str, tmp_path: Path) -> None:
    """Else no site is merged; where they are the same, the merged adapter leaves them out too."""
    target = r"^encoder\.layer\.(0|2)\.(output)$"
    some = [written(tmp_path / f"some_{n}", module(backbone, n, target=target)) for n in range(2)]
    whole = written(tmp_path / "whole", module(backbone, 2))
    assert json.loads((some[0] / "adapter_config.json").read_text())["config"]["leave_out"] == [1]
    message = "some_0 and whole are at different sites; only whole has one at encoder.layer.1.output"
    with pytest.raises(UsageError, match=message):
        merge_adapters([*some, whole], tmp_path / "out", backbone=backbone, merge={"preset": "avg"})
    merged(some, tmp_path / "out", backbone, "avg")
    assert list(reloaded(tmp_path / "out", backbone).adapters) == [
        f"encoder.layer.{layer}.output.adapters.merged" for layer in (0, 2)
    ]


def test_nothing_is_left_of_a_merge_that_fails(
    family: list[Path], backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("peft_lightning.exchange.merging.draw_merge", fails)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        merge_adapters(family, tmp_path / "out", backbone=backbone, merge={"preset": "avg"})
    assert {path.name for path in tmp_path.iterdir()} == before


# -- what other libraries wrote --------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.filterwarnings(LEFT)
@pytest.mark.parametrize("kind", ["seq_bn", "double_seq_bn", "par_bn", "lora"])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_adapterhubs_own_files_merge_and_reload(
    architecture: str, kind: str, shared_data: Path, tmp_path: Path
) -> None:
    """Twice the same adapter is that adapter, whatever the preset: the outputs that AdapterHub's library computed."""
    folder = shared_data / "fixtures" / "adapterhub" / architecture / kind
    if not folder.is_dir():
        pytest.skip(f"the fixtures are absent: {folder}")
    backbone = {"name": str(folder.parent / "backbone"), "tokenizer": "toy"}
    preset = "svd" if kind == "lora" else "acts+"
    options: dict[str, Any] = {} if kind == "lora" else {"data": TEXTS}
    merge = {"preset": preset, "tokens": 100}
    merge_adapters(
        [folder, folder],
        tmp_path / "out",
        backbone=backbone,
        merge=merge,
        format="adapterhub",
        max_length=16,
        **options,
    )
    back = import_adapter(tmp_path / "out", task="mrpc", backbone=backbone)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        states = back.backbone(**{name: expected[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    assert_close(states, expected["last_hidden_state"], rtol=0, atol=1e-5)
