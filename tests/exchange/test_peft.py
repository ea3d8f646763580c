"""PEFT itself reads what we write, and we read what it writes: the same outputs both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification

from peft_lightning import SparseAdapterModule
from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.errors import CheckpointError
from peft_lightning.exchange import ExchangeWarning, export_adapter, import_adapter
from tests.toy import build

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "init_std": 0.2,
}
FAMILIES = ("bert", "roberta", "electra", "deberta-v2", "bart", "llama", "qwen2", "qwen3")
INPUTS = {"input_ids": torch.arange(4, 16).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}


def setting(model_type: str) -> dict[str, Any]:
    sizes = BART if model_type == "bart" else SIZES
    if model_type not in ("llama", "qwen2", "qwen3"):
        sizes = {key: value for key, value in sizes.items() if key != "num_key_value_heads"}
    return {"config": {"model_type": model_type, **sizes}, "tokenizer": "toy"}


def bare(model_type: str) -> Any:
    """The bare model of a module with the default seed."""
    with torch.random.fork_rng():
        torch.manual_seed(42)
        return build_backbone(BackboneConfig(**setting(model_type))).eval()


def module(model_type: str, sparsity: float = 0.0, **adapter: Any) -> SparseAdapterModule:
    built: SparseAdapterModule = build(
        SparseAdapterModule,
        backbone=setting(model_type),
        adapter={"kind": "lora", "bottleneck": 4, "scaling": 1.5, **adapter},
        prune={"sparsity": sparsity, "score": "random"},
    )
    built.configure_model()
    for parameter in built.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    if sparsity:
        built.install_masks(())
    return built.eval()


def run(model: Any) -> Tensor:
    with torch.no_grad():
        output = model(**INPUTS)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("target", [None, "(fc2|output.dense|o_proj)$", ""])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_peft_reloads_our_lora_on_the_bare_model(model_type: str, target: str | None, tmp_path: Path) -> None:
    if target and model_type == "bart":
        target = "fc2$"
    ours = module(model_type, 0.4, target=target)
    base = bare(model_type)
    without = run(base)
    export_adapter(ours, tmp_path / "out", format="peft", head=False)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert_close(run(theirs), run(ours.backbone), rtol=0, atol=1e-5)
    assert (run(theirs) - without).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="the head is new"):
        back = import_adapter(tmp_path / "out", task="toy_sentiment", backbone=setting(model_type))
    state = ours.owned_state()
    for name, tensor in back.owned_state().items():
        assert name.startswith("head.") or torch.equal(tensor, state[name])
    assert torch.equal(run(back.backbone), run(ours.backbone))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["dense"], "use_rslora": True, "lora_alpha": 3},
        {"target_modules": r".*\.(key|intermediate\.dense)"},
        {"target_modules": ["query"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
        {
            "target_modules": ["query", "value"],
            "rank_pattern": {"query|value": 3},
            "alpha_pattern": {".*query|value": 7},
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_we_read_what_peft_saved_from_a_bare_model(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = get_peft_model(bare(model_type), LoraConfig(**{"r": 4, **options})).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the head is new"):
        ours = import_adapter(tmp_path, task="toy_sentiment", backbone=setting(model_type))
    assert_close(run(ours.backbone), run(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_we_read_what_peft_saved_from_a_sequence_classifier(model_type: str, tmp_path: Path) -> None:
    """BERT's head stands on the pooler of the base model, which is in no adapter's folder."""
    base = sequence_classifier(model_type, tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])).eval()
    shake(theirs)
    theirs.save_pretrained(str(tmp_path / "saved"))
    backbone = {"name": str(tmp_path / "base"), "tokenizer": "toy"}
    ours = import_adapter(tmp_path / "saved", task="toy_sentiment", backbone=backbone)
    with torch.no_grad():
        assert_close(ours(INPUTS), run(theirs), rtol=0, atol=1e-5)
    if model_type == "bert":
        with pytest.raises(CheckpointError, match="stands on the base model's pooler, which this backbone lacks"):
            import_adapter(tmp_path / "saved", task="toy_sentiment", backbone=setting("bert"))
    with pytest.warns(UserWarning, match="the head is new"):
        import_adapter(tmp_path / "saved", task="toy_sentiment", backbone=backbone, new_head=True)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_peft_reloads_our_lora_with_its_head(model_type: str, tmp_path: Path) -> None:
    sequence_classifier(model_type, tmp_path / "base")
    backbone = {"name": str(tmp_path / "base"), "tokenizer": "toy"}
    ours: SparseAdapterModule = build(
        SparseAdapterModule, backbone=backbone, adapter={"kind": "lora", "bottleneck": 4}, prune={"sparsity": 0.0}
    )
    ours.configure_model()
    for parameter in ours.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    export_adapter(ours.eval(), tmp_path / "out", format="peft", head=True)
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert_close(run(theirs), ours(INPUTS), rtol=0, atol=1e-5)
    back = import_adapter(tmp_path / "out", task="toy_sentiment", backbone=backbone)
    with torch.no_grad():
        assert torch.equal(back(INPUTS), ours(INPUTS))


def test_a_head_that_stays_behind_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the head stays behind"):
        export_adapter(module("bert"), tmp_path / "out", format="peft")


def recorded(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("made_for", "recorded_class", "fits"),
    [
        ("bert", "BertModel", True),
        ("bert", "BertForMaskedLM", True),
        ("bert", "BertGenerationEncoder", False),
        ("bert", "BertForged", False),
        ("qwen2", "Qwen2ForCausalLM", True),
        ("qwen2", "Qwen2MoeModel", False),
        ("qwen2", "Qwen2MoeForCausalLM", False),
        ("deberta-v2", "DebertaModel", False),
    ],
)
def test_the_class_is_compared_exactly(made_for: str, recorded_class: str, fits: bool, tmp_path: Path) -> None:
    export_adapter(module(made_for), tmp_path / "out", format="peft", head=False)
    recorded(tmp_path / "out", auto_mapping={"base_model_class": recorded_class})
    if fits:
        with pytest.warns(UserWarning, match="the head is new"):
            import_adapter(tmp_path / "out", task="toy_sentiment", backbone=setting(made_for))
    else:
        with pytest.raises(CheckpointError, match=f"class {recorded_class} here "):
            import_adapter(tmp_path / "out", task="toy_sentiment", backbone=setting(made_for))


@pytest.mark.parametrize(
    ("name", "sounds"),
    [
        ("google-bert/bert-base-uncased", "like bert"),
        ("models/legal-bert-small/", "like bert"),
        ("roberta-base", None),
        ("distilbert-base", None),
        ("Qwen/Qwen2.5-7B", "like qwen2"),
        (None, None),
    ],
)
def test_a_file_that_does_not_say_its_architecture_is_noted(name: Any, sounds: str | None, tmp_path: Path) -> None:
    """The shapes fit, and nothing proves that the model does."""
    export_adapter(module("bert"), tmp_path / "out", format="peft", head=False)
    recorded(tmp_path / "out", auto_mapping=None, base_model_name_or_path=name, task_type="FEATURE_EXTRACTION")
    with pytest.warns(ExchangeWarning) as caught:
        import_adapter(tmp_path / "out", task="toy_sentiment", backbone=setting("roberta"))
    notes = [str(warning.message) for warning in caught]
    assert any("does not say which architecture it was made for; only the shapes were compared" in n for n in notes)
    assert [n for n in notes if "sounds like" in n] == ([n for n in notes if f"sounds {sounds}; the backbone" in n])
    assert any("sounds like" in n for n in notes) == (sounds is not None)


def test_a_deeper_model_of_peft_is_refused(tmp_path: Path) -> None:
    for target in (["query"], r".*\.query"):
        theirs = get_peft_model(bare("bert"), LoraConfig(r=4, target_modules=target))
        theirs.save_pretrained(tmp_path)
        for layers, message in ((3, "num_hidden_layers 2 here 3|missing 1: encoder.layer.2"),
                                (1, "num_hidden_layers 2 here 1|unexpected 1: encoder.layer.1")):  # fmt: skip
            backbone = setting("bert")
            backbone["config"] = {**backbone["config"], "num_hidden_layers": layers}
            with pytest.raises(CheckpointError, match=message):
                import_adapter(tmp_path, task="toy_sentiment", backbone=backbone)


def test_a_classifier_of_another_architecture_is_refused(tmp_path: Path) -> None:
    theirs = get_peft_model(
        sequence_classifier("roberta", tmp_path / "base"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match="prefix roberta here bert"):
        import_adapter(tmp_path / "saved", task="toy_sentiment", backbone=setting("bert"))


def shake(model: Any) -> None:
    """Random values for all that a file holds."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def sequence_classifier(model_type: str, folder: Path) -> Any:
    config = AutoModel.from_config(bare(model_type).config).config
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    return model
