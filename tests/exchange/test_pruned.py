"""Pruned models out and back: as ordinary models of transformers, under PEFT, and as our own; what differs is said."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from peft_lightning import PruneLoRAModule, SparseAdapterModule, load, load_pruned
from peft_lightning.backbones.build import as_backbone_config, build_backbone
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.exchange import ExchangeWarning, export_adapter, import_adapter
from peft_lightning.layers.norms import backbone_norms
from peft_lightning.reading.seal import sealed
from tests.families import inputs
from tests.pruned import HEADS, four_heads, pruned
from tests.toy import build

CLASSIFIERS = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}
EACH = pytest.mark.parametrize("family", HEADS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Folders of whole backbones, in which no bias is 0, where a slip would not show."""
    folders: dict[Any, str] = {}

    def folder(family: str, **changes: Any) -> str:
        key = (family, *changes.items())
        if key not in folders:
            torch.manual_seed(0)
            model: Any = build_backbone(as_backbone_config(four_heads(family, **changes)))
            for parameter in model.parameters():
                parameter.data.add_(0.05 * torch.randn(parameter.shape))
            folders[key] = str(tmp_path_factory.mktemp("whole") / family)
            model.save_pretrained(folders[key])
        return folders[key]

    yield folder


def module(name: str, **options: Any) -> PruneLoRAModule:
    """A pruned and trained module on the backbone in a folder."""
    backbone = {"name": name, "tokenizer": "toy", **options.pop("backbone", {})}
    return pruned(backbone, **options)


def run(model: Any) -> Tensor:
    """Logits, or the bare model's last states."""
    with torch.no_grad():
        output = model(**inputs())
    return cast(Tensor, output.logits if "logits" in output else output.last_hidden_state)


def logits(m: PruneLoRAModule) -> Tensor:
    with torch.no_grad():
        return m(inputs())


def quietly(m: PruneLoRAModule, folder: Path, **options: Any) -> Path:
    """Export, without the notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExchangeWarning)
        export_adapter(m, folder, **options)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change a file's values; what ``pruned.json`` says of its digest follows, and of its own."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(sealed(content) if path.name == "pruned.json" else content))
    if path.name == "config.json":
        redigest(path)


def redigest(path: Path) -> None:
    record = path.with_name("pruned.json")
    digests = json.loads(record.read_text())["sha256"]
    edit(record, sha256={**digests, path.name: hashlib.sha256(path.read_bytes()).hexdigest()})


# -- whole models ---------------------------------------------------------------------------------------------------


@EACH
def test_a_whole_model_computes_what_the_module_does(
    family: str, whole: Callable[..., str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    m = module(whole(family))
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    out = tmp_path / "out"
    export_adapter(m, out, format="transformers")
    assert all(torch.equal(tensor, before[name]) for name, tensor in m.state_dict().items())
    assert m.state_dict().keys() == before.keys() and not any(lora.merged for lora in m.loras.values())
    model = load_pruned(out)
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "model.safetensors", "pruned.json", "tokenizer.json"}
    notes = [str(warning.message) for warning in recwarn if warning.category is ExchangeWarning]
    if family in CLASSIFIERS:
        assert (type(model).__name__, notes) == (CLASSIFIERS[family], []) and "head.safetensors" not in files
        assert model.config.id2label == dict(enumerate(m.task.labels))
        assert_close(run(model), logits(m), rtol=0, atol=1e-5)
    else:
        assert type(model) is type(m.backbone) and "head is beside the model in head.safetensors" in notes[0]
        head = load_file(out / "head.safetensors")
        assert head.keys() == m.head.state_dict().keys()
        assert all(torch.equal(tensor, head[name]) for name, tensor in m.head.state_dict().items())
        assert_close(run(model), run(m.backbone), rtol=0, atol=1e-5)
    assert not model.training and not any("lora" in name for name in model.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in model.parameters())
    twice = load_pruned(quietly(m, tmp_path / "again", format="transformers"))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert torch.equal(run(twice), run(model))


def test_the_head_may_stay_behind(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"))
    export_adapter(m, tmp_path / "out", format="transformers", head=False)
    model = load_pruned(tmp_path / "out")
    assert type(model) is type(m.backbone) and not (tmp_path / "out/head.safetensors").exists()
    assert_close(run(model), run(m.backbone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_a_layer_without_heads(family: str, whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole(family), heads={1: ()})
    model = load_pruned(quietly(m, tmp_path / "whole", format="transformers", head=False))
    assert_close(run(model), run(m.backbone), rtol=0, atol=1e-5)
    quietly(m, tmp_path / "lora", format="peft")
    theirs = PeftModel.from_pretrained(load_pruned(tmp_path / "lora", whole(family)), str(tmp_path / "lora"))
    assert_close(run(theirs), run(m.backbone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_backbone_in_bfloat16_is_not_rounded_again(family: str, whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole(family), backbone={"dtype": "bfloat16"})
    exact = copy.deepcopy(m.backbone).float()
    model = load_pruned(quietly(m, tmp_path / "whole", format="transformers", head=False))
    assert_close(run(model), run(exact), rtol=0, atol=1e-5)
    assert m.backbone.dtype == torch.bfloat16
    quietly(m, tmp_path / "lora", format="peft")
    theirs = PeftModel.from_pretrained(load_pruned(tmp_path / "lora", whole(family)), str(tmp_path / "lora"))
    assert_close(run(theirs), run(exact), rtol=0, atol=1e-5)


def test_without_pruning_transformers_reads_it_alone(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"), prune={"heads_to_prune": 0}, lora={"rank": 2, "high_rank": 2})
    export_adapter(m, tmp_path / "out", format="transformers")
    model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(run(model.eval()), logits(m), rtol=0, atol=1e-5)
    assert torch.equal(run(load_pruned(tmp_path / "out")), run(model))


def test_a_merged_module_and_a_file_give_the_same(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"))
    export_adapter(m, tmp_path / "ours", format="peft_lightning")
    for name, source in (("module", m), ("file", tmp_path / "ours"), ("merged", copy.deepcopy(m).merge())):
        export_adapter(source, tmp_path / name, format="transformers")
    for file in ("model.safetensors", "config.json", "pruned.json"):
        assert len({(tmp_path / name / file).read_bytes() for name in ("module", "file", "merged")}) == 1


@pytest.mark.parametrize("task", ["toy_similarity", "toy_sentiment"])
def test_heads_that_transformers_has_and_has_not(task: str, whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"), task=task, head="dense" if task == "toy_similarity" else "linear")
    quietly(m, tmp_path / "out", format="transformers")
    model = load_pruned(tmp_path / "out")
    if task == "toy_similarity":
        assert model.config.num_labels == 1
        assert_close(run(model), logits(m), rtol=0, atol=1e-5)
        return
    assert load_file(tmp_path / "out/head.safetensors").keys() == {"out.weight", "out.bias"}
    with pytest.raises(CheckpointError, match="does not compute what this head does; export without the head"):
        export_adapter(m, tmp_path / "lora", format="peft", head=True)
    assert not (tmp_path / "lora").exists()


def test_no_place_on_this_machine_is_told(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"))
    for format in ("transformers", "peft"):
        quietly(m, tmp_path / format, format=format)
        for path in (tmp_path / format).iterdir():
            assert str(Path(whole("bert")).parent).encode() not in path.read_bytes()


def test_a_tokenizer_that_cannot_be_loaded_stays_behind(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"), backbone={"tokenizer": str(tmp_path / "ghost")})
    with pytest.warns(ExchangeWarning, match="the tokenizer stays behind .*ghost"):
        export_adapter(m, tmp_path / "out", format="transformers")
    assert_close(run(load_pruned(tmp_path / "out")), logits(m), rtol=0, atol=1e-5)


# -- under PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head"), [*((family, False) for family in HEADS), ("bert", True), ("roberta", True)]
)
def test_peft_computes_what_the_module_does(family: str, head: bool, whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole(family), lora={"scaling": 0.5})
    expected = logits(m) if head else run(m.backbone)
    quietly(m, tmp_path / "out", format="peft", head=head or None)
    base = load_pruned(tmp_path / "out", whole(family))
    assert type(base).__name__ == (CLASSIFIERS[family] if head else type(m.backbone).__name__)
    assert (run(base) - expected).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a pattern that matched nothing
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert_close(run(theirs), expected, rtol=0, atol=1e-5)
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): tensor.shape[0]
        for name, tensor in theirs.state_dict().items()
        if ".lora_A." in name
    }
    prefix = f"{family}." if head else ""
    ours = {f"{prefix}{path.partition('.loras.')[0]}": lora.lora_A.shape[0] for path, lora in m.loras.items()}
    assert found == ours and set(ours.values()) == ({1, 2, 3} if family == "bart" else {1, 2})
    merged = theirs.merge_and_unload()
    assert_close(run(merged), expected, rtol=0, atol=1e-5)
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())


def test_layer_1_is_not_layer_11(whole: Callable[..., str], tmp_path: Path) -> None:
    name = whole("bert", num_hidden_layers=12)
    m = module(name)
    assert m.plan is not None and m.plan.ranks["encoder.layer.1"] != m.plan.ranks["encoder.layer.11"]
    quietly(m, tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert r"^encoder\.layer\.1\.attention\.self\.query" in config["rank_pattern"]
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    theirs = PeftModel.from_pretrained(load_pruned(tmp_path / "out", name), str(tmp_path / "out")).eval()
    assert_close(run(theirs), run(m.backbone), rtol=0, atol=1e-5)


def test_the_note_is_for_both_ways_of_export(whole: Callable[..., str], tmp_path: Path) -> None:
    with pytest.warns(ExchangeWarning, match=r"to take it along, set head \(command line: with, Python: True\)$"):
        export_adapter(module(whole("bert")), tmp_path / "out", format="peft")


def test_norms_that_were_not_trained_stay_the_backbones(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"), train_norms=False)
    quietly(m, tmp_path / "out", format="peft")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] is None
    theirs = PeftModel.from_pretrained(load_pruned(tmp_path / "out", whole("bert")), str(tmp_path / "out")).eval()
    assert_close(run(theirs), run(m.backbone), rtol=0, atol=1e-5)
    trained = module(whole("bert"))
    quietly(trained, tmp_path / "trained", format="peft")
    saved = json.loads((tmp_path / "trained/adapter_config.json").read_text())["modules_to_save"]
    assert saved == sorted(backbone_norms(trained.backbone))


def test_a_backbone_of_random_weights_is_found_by_its_seed(tmp_path: Path) -> None:
    m = pruned(
        four_heads("bert"),
        lora={"rank": 2, "high_rank": 2},
        prune={"order": "random", "heads_to_prune": 3},
        seed=7,
    )
    quietly(m, tmp_path / "out", format="peft")
    before = torch.random.get_rng_state()
    base = load_pruned(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert_close(run(theirs), run(m.backbone), rtol=0, atol=1e-5)


def test_the_wrong_backbone_says_what_differs(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"))
    quietly(m, tmp_path / "out", format="peft")
    with pytest.raises(UsageError, match="out was made on a folder named 'bert'; say where it is"):
        load_pruned(tmp_path / "out")
    export_adapter(m, tmp_path / "ours", format="peft_lightning")
    other = whole("bert", num_hidden_layers=3)
    twin = whole("bert", initializer_range=0.2)
    for name, message in (
        (other, "belongs to another backbone .num_hidden_layers 2 here 3"),
        (whole("roberta"), "belongs to another backbone .model_type bert here roberta"),
        (twin, "a backbone of the same shape with other weights"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_pruned(tmp_path / "out", name)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "ours", backbone={"name": name, "tokenizer": "toy"})
    with pytest.raises(UsageError, match="^backbone = '.*ghost': there is no such folder$"):
        load_pruned(tmp_path / "out", tmp_path / "ghost")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="^backbone = '.*empty': cannot be built"):
        load_pruned(tmp_path / "out", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="is LoRA for a pruned model; load_pruned.. gives the model"):
        import_adapter(tmp_path / "out", task="toy_sentiment", backbone=whole("bert"))


@EACH
def test_our_own_folder_gives_the_module_back(family: str, whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole(family))
    export_adapter(m, tmp_path / "ours", format="peft_lightning")
    back = load(tmp_path / "ours")
    assert back.plan == m.plan and torch.equal(logits(back), logits(m))


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["peft", "peft_lightning", "transformers", "onnx"])
def test_nothing_decided_nothing_written(format: str, whole: Callable[..., str], tmp_path: Path) -> None:
    undecided: PruneLoRAModule = build(PruneLoRAModule, backbone={"name": whole("bert"), "tokenizer": "toy"})
    with pytest.raises(UsageError, match="has not decided yet what goes; fit it first, or give importance.file"):
        export_adapter(undecided, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_formats_that_do_not_fit(whole: Callable[..., str], tmp_path: Path) -> None:
    m = module(whole("bert"))
    with pytest.raises(UsageError, match="'adapterhub': PruneLoRAModule can be written as peft, peft_lightning, tra"):
        export_adapter(m, tmp_path / "out", format="adapterhub")
    with pytest.raises(UsageError, match="'transformers': SparseAdapterModule can be written as adapterhub, peft"):
        export_adapter(build(SparseAdapterModule), tmp_path / "out", format="transformers")
    with pytest.raises(UsageError, match="head = False: format = 'onnx' always has the head"):
        export_adapter(m, tmp_path / "out", format="onnx", head=False)
    with pytest.raises(CheckpointError, match="backbone of type 'electra': its sequence classifier"):
        export_adapter(module(whole("electra")), tmp_path / "out", format="peft", head=True)
    headless = module(whole("bert"), heads={0: (), 1: ()})
    with pytest.raises(CheckpointError, match="there is no LoRA to write: no attention has a head left"):
        export_adapter(headless, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
    export_adapter(m, tmp_path / "out", format="transformers")
    with pytest.raises(UsageError, match="is a whole model; leave the option out"):
        load_pruned(tmp_path / "out", whole("bert"))


@pytest.fixture(scope="module")
def exported(whole: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model's folder; copy it before it is damaged."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_adapter(module(whole("bert")), folder, format="transformers")
    return folder


def test_what_a_file_names_is_not_run(exported: Path, tmp_path: Path) -> None:
    """Neither code nor a kernel is fetched, and no module is imported."""
    folder = copied(exported, tmp_path)
    edit(
        folder / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "somebody/evil--modeling.Model"},
        _attn_implementation="somebody/kernel",
        attn_implementation="somebody/kernel",
        architectures=["evil.Model"],
        quantization_config={"quant_method": "evil"},
    )
    assert torch.equal(run(load_pruned(folder)), run(load_pruned(exported)))
    for name in ("os.system", "BertForMaskedLM", "RobertaModel"):
        edit(folder / "pruned.json", model_class=name)
        with pytest.raises(CheckpointError, match=f"model_class = '{name}': must be BertModel or BertForSequenceCl"):
            load_pruned(folder)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 3}, "belongs to another backbone .num_hidden_layers 2 here 3"),
    ({"hidden_size": 32}, "belongs to another backbone .hidden_size 16 here 32"),
    ({"num_attention_heads": 8}, "num_attention_heads 4 here 8"),
    ({"model_type": "roberta"}, "model_type bert here roberta"),
    ({"model_type": "ghost"}, "model_type = 'ghost': must be one of bert, roberta"),
    ({"model_type": ["bert"]}, "model_type = .*: must be one of bert, roberta"),
    ({"hidden_act": "ghost"}, "config.json: makes no model"),
    ({"hidden_size": "sixteen"}, "config.json: is no configuration"),
    ({"type_vocab_size": 5}, "different 1: bert.embeddings.token_type_embeddings.weight"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=str)
def test_another_configuration(changes: dict[str, Any], message: str, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pruned(folder)


def test_another_number_of_outputs(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    edit(folder / "pruned.json", outputs=5)
    with pytest.raises(CheckpointError, match="pruned.json has 5 outputs, config.json 2"):
        load_pruned(folder)


def test_a_pruned_folder_is_no_backbone(exported: Path) -> None:
    with pytest.raises(UsageError, match="a pruned model, which only peft_lightning.load_pruned reads; begin with the"):
        build(PruneLoRAModule, backbone={"name": str(exported), "tokenizer": "toy"}).configure_model()


KINDS = {
    "adapter": "LoRA for a pruned model, which peft_lightning.load_pruned gives; begin with the whole backbone",
    "onnx": "a pruned model as ONNX, which only onnxruntime runs; begin with the whole backbone",
    "model": "a pruned model, which only peft_lightning.load_pruned reads; begin with the whole backbone",
    "damaged": "a pruned model, which only peft_lightning.load_pruned reads; begin with the whole backbone",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_folder_says_what_it_is(kind: str, tmp_path: Path) -> None:
    """To who takes it for a backbone, or for a tokenizer, which comes first."""
    content = "[" if kind == "damaged" else json.dumps({"kind": kind})
    (tmp_path / "pruned.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        build_backbone(as_backbone_config({"name": str(tmp_path), "tokenizer": "toy"}))
    assert str(caught.value) == f"backbone.name = '{tmp_path}': cannot be built ({KINDS[kind]})"
    with pytest.raises(UsageError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value) == f"backbone '{tmp_path}': its tokenizer cannot be loaded ({KINDS[kind]})"


def test_lora_for_a_pruned_model_is_no_backbone(whole: Callable[..., str], tmp_path: Path) -> None:
    quietly(module(whole("bert")), tmp_path / "out", format="peft")
    with pytest.raises(UsageError, match=r"its tokenizer cannot be loaded \(LoRA for a pruned model"):
        load_tokenizer(str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_pruned_model_that_transformers_saved_again(
    family: str, whole: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quietly(module(whole(family)), tmp_path / "out", format="transformers")
    load_pruned(tmp_path / "out").save_pretrained(tmp_path / "again")
    capfd.readouterr()
    message = (
        r"again': cannot be built \(\d+ tensors are not of the shape that its config.json says, as [\w.]+\.weight, "
        r"\(16, \d+\) and not \(16, \d+\): perhaps a pruned model that was saved again without pruned.json; begin "
    )
    with pytest.raises(UsageError, match=message) as caught:
        build_backbone(as_backbone_config({"name": str(tmp_path / "again"), "tokenizer": "toy"}))
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_more_layers_than_can_be_built(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    backbone = json.loads((folder / "pruned.json").read_text())["backbone"]
    edit(folder / "pruned.json", backbone={**backbone, "num_hidden_layers": 10**12})
    edit(folder / "config.json", num_hidden_layers=10**12)
    with pytest.raises(CheckpointError, match="config.json: has 1000000000000 layers, the plan in .* 2"):
        load_pruned(folder)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != QUERY}


TENSORS: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (without, f"missing 1: {QUERY}"),
    (lambda state: {**state, "ghost": torch.ones(1)}, "unexpected 1: ghost"),
    (lambda state: {**state, QUERY: torch.ones(16, 16)}, rf"different 1: {QUERY} \(\(16, 16\).*expected \(8, 16\)"),
    (lambda state: {**state, QUERY: state[QUERY].half()}, "different 1: .*float16, expected"),
    (lambda state: {**state, QUERY: state[QUERY] * torch.nan}, f"{QUERY} has values that are not finite"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[message for _, message in TENSORS])
def test_other_tensors(change: Any, message: str, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors: damaged or replaced .its SHA-256"):
        load_pruned(folder)
    redigest(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_pruned(folder)


ATTENTION = "encoder.layer.0.attention.self"
PLANS: list[tuple[dict[str, Any], str]] = [
    ({"heads": {ATTENTION: [0, 9]}}, "the heads to keep must be numbers from 0 to 3"),
    ({"heads": {ATTENTION: [0, 1, 2]}}, "different 7: bert.encoder.layer.0.attention.output.dense"),
    ({"units": {ATTENTION: 5}}, "the plan is for attentions with heads"),
    ({"heads": {"ghost": [0]}}, "the plan is for attentions with heads"),
    ({"neurons": {"encoder.layer.0": "80000000"}}, "different 3: bert.encoder.layer.0.intermediate.dense"),
    ({"neurons": {"encoder.layer.0": "8000000"}}, "damaged .neurons in its plan must be 8 hex digits"),
    ({"neurons": {"encoder.layer.0": "8"}, "inner": {"encoder.layer.0": 4}}, "the plan is for layers with neurons"),
    ({"ranks": {"ghost": 1}}, "has 2 layers, the plan in .* 3"),
    ({"ranks": {"encoder.layer.0": 99}}, "rank 99 for .*query: must be from 1 to 8, its smaller dimension"),
    ({"ranks": {"encoder.layer.0": "one"}}, "damaged .ranks"),
]


@pytest.mark.parametrize(("changes", "message"), PLANS, ids=str)
def test_other_plans(changes: dict[str, Any], message: str, exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    plan = json.loads((folder / "pruned.json").read_text())["plan"]
    edit(folder / "pruned.json", plan={**plan, **{name: {**plan[name], **more} for name, more in changes.items()}})
    with pytest.raises(CheckpointError, match=message):
        load_pruned(folder)


def copied(folder: Path, place: Path) -> Path:
    new = place / "copied"
    new.mkdir(parents=True)
    for path in folder.iterdir():
        (new / path.name).write_bytes(path.read_bytes())
    return new
