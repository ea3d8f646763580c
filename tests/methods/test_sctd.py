"""SCTD's losses against the formulas written out, its schedule, its importance table, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from peft_lightning import DropConfig, FineTuneModule, MLMDataModule, SCTDPretrainModule, SparseAdapterModule, load
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.callbacks.report import Report
from peft_lightning.callbacks.throughput import Throughput
from peft_lightning.errors import CheckpointError, PeftLightningError, UsageError
from peft_lightning.layers.drop_config import PRESETS
from tests.reference.token_drop import dropped_pass, full_pass
from tests.toy import build, data, deep, tiny, toy_corpus, trainer

EXACT: Any = {"rtol": 1e-10, "atol": 1e-11}


def module_of(**drop: Any) -> Any:
    module = build(SCTDPretrainModule, dropout=0.0, drop=drop)
    module.configure_model()
    return module


def batch_of(blocks: int = 4, **options: Any) -> dict[str, Tensor]:
    source = data(batch_size=blocks, method=SCTDPretrainModule, **options)
    source.setup("fit")
    return next(iter(source.train_dataloader()))


def at(x_BSD: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([row[places] for row, places in zip(x_BSD, positions, strict=True)])


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over the last dimension of p log(p / q), for every token."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def plain_loss(module: Any, batch: dict[str, Tensor], keep: Tensor) -> Tensor:
    """Equation 4 at a semantic-consistent step, from passes that share nothing."""
    drop, y = module.drop, batch["labels"].flatten()
    bare, head, ids, targets = module.model.bert, module.model.cls, batch["input_ids"], batch["targets"]
    end, kept = dropped_pass(bare, ids, keep)
    full, before = full_pass(bare, ids)
    merged = torch.stack(
        [
            torch.stack(
                [kept[b, keep[b].tolist().index(i)] if i in keep[b] else early[b, i] for i in range(ids.shape[1])]
            )
            for early in [prefix(bare, ids)]
            for b in range(len(ids))
        ]
    )
    student, teacher = (F.cross_entropy(head(at(x, targets)).flatten(0, 1), y) for x in (end, full))
    other = {"teacher": teacher, "student": student}.get(drop.of("full_loss"))
    loss = student if other is None else 0.5 * student + 0.5 * other
    cut = (lambda x: x.detach()) if drop.of("detach") else (lambda x: x)
    per_target = len(ids) / len(y)
    terms = {
        "masked_logits": lambda t, s: kl(cut(head(at(t, targets))), head(at(s, targets))).mean(),
        "all_hidden": lambda t, s: kl(cut(t), s).mean(),
        "cls_hidden": lambda t, s: kl(cut(t[:, 0]), s[:, 0]).mean() * per_target,
        "kept_hidden": lambda t, s: kl(cut(at(t, keep)), at(s, keep)).mean(),
        "none": lambda t, s: torch.zeros(()),
    }
    both = terms[drop.of("global_kl")](full, end) + terms[drop.of("local_kl")](before, merged)
    return loss + drop.of("weight") * both


def prefix(bare: Any, ids: Tensor) -> Tensor:
    """States below the first layer that leaves tokens out."""
    x: Tensor = bare.embeddings(input_ids=ids)
    for layer in bare.encoder.layer[: len(bare.encoder.layer) // 2 - 1]:
        x = layer(x)
    return x


CASES: list[dict[str, Any]] = [
    {"preset": "sctd"},
    {"preset": "sctd-paper"},
    {"preset": "sctd-released"},
    {"preset": "sctd", "share_prefix": False, "sparse_last": False},
    {"preset": "sctd", "global_kl": "none"},
    {"preset": "sctd", "local_kl": "none"},
    {"preset": "sctd", "full_loss": "none"},
    {"preset": "sctd", "global_kl": "none", "local_kl": "none", "full_loss": "none"},
    {"preset": "sctd", "global_kl": "all_hidden", "local_kl": "cls_hidden", "weight": 1.0},
    {"preset": "sctd-released", "share_prefix": True, "detach": True, "weight": 3.0},
]


@pytest.mark.parametrize("drop", CASES, ids=lambda drop: " ".join(str(v) for v in drop.values()))
def test_a_semantic_consistent_step_is_equation_4(drop: dict[str, Any]) -> None:
    module = module_of(**drop)
    module.double()
    batch = batch_of()
    keep = module.choose(batch["input_ids"], batch["noise"])
    loss, found, terms = module.losses(batch, "both")
    expected = plain_loss(module, batch, keep)
    assert_close(loss, expected, **EXACT)
    parameters = [p for p in module.model.parameters()]
    got, want = (
        torch.autograd.grad(x, parameters, allow_unused=True, materialize_grads=True) for x in (loss, expected)
    )
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, **EXACT)
    student, teacher, global_kl, local_kl, share = terms.tolist()
    assert abs(share - module.drop.of("weight") * (global_kl + local_kl) / float(loss)) < 1e-9
    assert abs(float(found.token_losses.mean()) - student) < 1e-9
    assert bool(global_kl > 0) == (module.drop.of("global_kl") != "none")
    assert bool(local_kl > 0) == (module.drop.of("local_kl") != "none")
    if module.drop.of("full_loss") == "teacher":
        assert abs(teacher - student) > 1e-6


def test_the_other_steps() -> None:
    module = module_of(preset="sctd")
    module.double()
    batch = batch_of()
    y, head = batch["labels"].flatten(), module.model.cls
    keep = module.choose(batch["input_ids"], batch["noise"])
    end, _ = dropped_pass(module.model.bert, batch["input_ids"], keep)
    expected = F.cross_entropy(head(at(end, batch["targets"])).flatten(0, 1), y)
    assert_close(module.losses(batch, "dropping")[0], expected, **EXACT)
    labels = torch.full_like(batch["input_ids"], -100).scatter(1, batch["targets"], batch["labels"])
    assert_close(
        module.losses(batch, "full")[0], module.model(input_ids=batch["input_ids"], labels=labels).loss, **EXACT
    )


def test_the_schedule_of_every_preset() -> None:
    plans = {name: [DropConfig(preset=name).passes(step) for step in range(1, 31)] for name in PRESETS}
    assert plans["mlm"] == ["full"] * 30
    assert plans["token-drop"] == ["dropping"] * 30
    assert plans["drop+full"] == (["dropping"] * 9 + ["full"]) * 3
    for name in ("sctd", "sctd-paper", "sctd-released"):
        assert plans[name] == (["dropping"] * 9 + ["both"]) * 3
    assert [DropConfig(interval=1).passes(step) for step in (1, 2)] == ["both", "both"]


class Watch(L.Callback):
    """Notes which passes each micro-batch had."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append((trainer.global_step + 1, pl_module.drop.passes(trainer.global_step + 1)))


def test_all_micro_batches_of_a_step_are_of_one_kind_and_the_terms_are_logged(tmp_path: Path) -> None:
    module, watch = build(SCTDPretrainModule), Watch()
    source = data(batch_size=8, method=SCTDPretrainModule)
    trainer(tmp_path, max_steps=7, accumulate_grad_batches=2, callbacks=[watch]).fit(module, datamodule=source)
    assert watch.seen == [(step, "both" if step % 3 == 0 else "dropping") for step in range(1, 8) for _ in range(2)]
    rows = [row for row in MetricsCSV(tmp_path).read() if "train/kl_share" in row]
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(0 < float(row["train/kl_share"]) < 1 and float(row["train/full_masked_lm"]) > 0 for row in rows)


def test_kept_tokens_are_the_important_ones() -> None:
    module, batch = module_of(preset="token-drop"), batch_of()
    module.importance.table[:] = torch.arange(len(module.importance.table)).float()
    keep = module.choose(batch["input_ids"], batch["noise"])
    assert keep.shape == (4, 8)
    special = {module.tokenizer.cls_token_id, module.tokenizer.sep_token_id, module.tokenizer.mask_token_id}
    for ids, places in zip(batch["input_ids"].tolist(), keep.tolist(), strict=True):
        kept, gone = [ids[i] for i in places], [ids[i] for i in range(16) if i not in places]
        assert not special & set(gone)
        assert max(gone) <= min(i for i in kept if i not in special)


def test_random_selection_ignores_the_table() -> None:
    module, batch = module_of(preset="token-drop", selection="random"), batch_of(blocks=64)
    module.importance.table[:20] = 100.0
    counts = torch.zeros(len(module.importance.table))
    for ids, places in zip(batch["input_ids"], module.choose(batch["input_ids"], batch["noise"]), strict=True):
        counts[ids[places]] += 1
    present = torch.bincount(batch["input_ids"].flatten(), minlength=len(counts))
    words = (present > 10) & (torch.arange(len(counts)) > 4)
    share = (counts / present)[words]
    assert share.min() > 0.15 and share.max() < 0.75


def test_importance_follows_the_losses_and_travels(tmp_path: Path) -> None:
    module = build(SCTDPretrainModule)
    trainer(tmp_path, max_steps=5).fit(module, datamodule=data(method=SCTDPretrainModule))
    table = module.importance.table
    assert (table[5:35] < 10).all() and (table[:5] == 10).all()
    again = load(tmp_path / "last.ckpt")
    assert torch.equal(again.importance.table, table)
    assert again.tokenizer.get_vocab() == module.tokenizer.get_vocab()


def poisoned(bad: int, count: int = 6) -> DataLoader[Any]:
    """Batches of which one refers to words whose embedding is not a number."""
    batches = [batch_of() for _ in range(count)]
    batches[bad] = {**batches[bad], "input_ids": torch.full_like(batches[bad]["input_ids"], 39)}
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [1, 2])
def test_a_loss_that_is_not_finite(bad: int, tmp_path: Path) -> None:
    """An ordinary step and a semantic-consistent one."""

    def fresh(non_finite: str) -> Any:
        module = build(SCTDPretrainModule, optim={"lr": 1e-3, "weight_decay": 0.0, "non_finite": non_finite})
        module.configure_model()
        with torch.no_grad():
            module.model.bert.embeddings.word_embeddings.weight[39] = torch.inf
            module.model.cls.predictions.decoder.weight = torch.nn.Parameter(torch.randn(64, 32) / 6)
        return module

    with pytest.raises(PeftLightningError, match=f"training loss is nan at step {bad + 1}; .*optim.non_finite skip"):
        trainer(max_steps=6).fit(fresh("stop"), poisoned(bad))
    states, module = [], fresh("skip")

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            states.append({n: t.clone() for n, t in pl_module.state_dict().items()})

    fit = trainer(max_steps=6, callbacks=[Keep()], logger=MetricsCSV(tmp_path))
    fit.fit(module, poisoned(bad))
    assert module.skipped_steps == 1 and fit.global_step == 6
    for name, tensor in states[bad - 1].items():
        assert torch.equal(states[bad][name], tensor), name  # weights and importance are as before
    assert not torch.equal(states[bad + 1]["importance.table"], states[bad]["importance.table"])
    rows = MetricsCSV(tmp_path).read()
    assert [row["step"] for row in rows if "train/skipped_steps" in row] == [str(bad + 1)]
    assert len([row for row in rows if "train/loss" in row]) == 5


def test_evaluation_reports_both_passes() -> None:
    module = build(SCTDPretrainModule)
    source = data(batch_size=8, method=SCTDPretrainModule)
    fit = trainer(max_steps=2)
    fit.fit(module, datamodule=source)
    scores = fit.validate(module, datamodule=source, verbose=False)[0]
    module.eval()
    sums: dict[str, list[float]] = {"": [0.0, 0.0], "dropped_": [0.0, 0.0]}
    count = 0
    for batch in source.val_dataloader():
        ids, targets, y = batch["input_ids"], batch["targets"], batch["labels"].flatten()
        with torch.no_grad():
            full, _ = full_pass(module.model.bert, ids)
            keep = module.choose(ids, batch["noise"])
            for name, x in (("", full), ("dropped_", dropped_pass(module.model.bert, ids, keep)[0])):
                logits = module.model.cls(at(x, targets)).flatten(0, 1)
                sums[name][0] += float(F.cross_entropy(logits, y, reduction="sum"))
                sums[name][1] += float((logits.argmax(-1) == y).sum())
        count += len(y)
    for name, (loss, right) in sums.items():
        assert_close(scores[f"val/{name}loss"], loss / count, rtol=1e-5, atol=1e-5)
        assert_close(scores[f"val/{name}accuracy"], right / count)
    plain = trainer().validate(build(SCTDPretrainModule, drop={"preset": "mlm"}), datamodule=source, verbose=False)[0]
    assert set(plain) == {"val/loss", "val/accuracy"}


def test_the_exported_folder_serves_everyone(tmp_path: Path) -> None:
    """transformers reads it, pretraining goes on from it, and other methods stand on it."""
    module = build(SCTDPretrainModule)
    source = data(method=SCTDPretrainModule)
    fit = trainer(
        tmp_path / "run", max_epochs=1, limit_train_batches=6, callbacks=[Report(tmp_path / "run"), Throughput()]
    )
    fit.fit(module, datamodule=source)
    folder = tmp_path / "run" / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    found, notes = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    batch = batch_of()
    with torch.no_grad():
        expected = module.eval().model(input_ids=batch["input_ids"]).logits
        assert_close(found.eval()(input_ids=batch["input_ids"]).logits, expected)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words("the cat")["input_ids"] == module.tokenizer("the cat")["input_ids"]

    warm = SCTDPretrainModule(backbone=str(folder), drop={"preset": "token-drop"}, optim={"lr": 1e-3})  # type: ignore[arg-type]
    warm.configure_model()
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(warm.model.state_dict()[name], tensor), name
    again = MLMDataModule(inputs=source.inputs, tokenizer=str(folder), block_size=16, batch_size=16)
    trainer(max_steps=2).fit(warm, datamodule=again)
    for method in (SparseAdapterModule, FineTuneModule):
        user = method(task="toy_sentiment", backbone=str(folder))
        user.configure_model()
        assert torch.equal(
            user.backbone.state_dict()["embeddings.word_embeddings.weight"],
            module.model.bert.embeddings.word_embeddings.weight,
        )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["preset"] == "sctd" and report["interval"] == 3 and report["steps"] == 6
    assert report["throughput"]["teacher_share"] == 2 / 6
    assert report["scores"]["loss"] > 0 and report["scores"]["dropped_loss"] > 0


def test_a_backbone_without_a_head_gets_a_new_one(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(**deep(tiny())["config"], vocab_size=40)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    from peft_lightning.backbones.toy import toy_tokenizer

    toy_tokenizer().save_pretrained(tmp_path)
    module = SCTDPretrainModule(backbone=str(tmp_path))
    with pytest.warns(UserWarning, match="has no head for masked language modelling"):
        module.configure_model()


def test_settings_that_are_refused() -> None:
    for drop, message in (
        ({"preset": "bert"}, r"drop.preset = 'bert': must be one of mlm, token-drop"),
        ({"keep": 0.0}, r"drop.keep = 0.0: must be the share of tokens kept, above 0 and at most 1"),
        ({"keep": 1.5}, r"drop.keep = 1.5"),
        ({"interval": 0}, r"drop.interval = 0: must be at least 1"),
        ({"weight": -1.0}, r"drop.weight = -1.0: must be at least 0"),
        ({"beta": 1.0}, r"drop.beta = 1.0: must lie in \[0, 1\)"),
        ({"global_kl": "kept_hidden"}, r"drop.global_kl = 'kept_hidden': must be one of masked_logits"),
        ({"selection": "best"}, r"drop.selection = 'best': must be one of loss, random"),
        ({"preset": "mlm", "interval": 5}, r"drop.interval = 5: means nothing to preset 'mlm'"),
        ({"preset": "mlm", "keep": 0.3}, r"drop.keep = 0.3: means nothing to preset 'mlm'"),
        ({"preset": "token-drop", "weight": 0.3}, r"drop.weight = 0.3: means nothing to preset 'token-drop'"),
        ({"preset": "drop+full", "detach": True}, r"drop.detach = True: means nothing"),
        ({"kepp": 0.5}, r"DropConfig has no option .kepp. .did you mean .keep"),
    ):
        with pytest.raises(UsageError, match=message):
            build(SCTDPretrainModule, drop=drop)
    with pytest.raises(UsageError, match="chunk = 0: must be a whole number, at least 1"):
        build(SCTDPretrainModule, chunk=0)
    with pytest.raises(UsageError, match="backbone.dtype = 'bfloat16': pretraining updates the backbone in float32"):
        build(SCTDPretrainModule, backbone=tiny(dtype="bfloat16"))
    with pytest.raises(UsageError, match="num_hidden_layers = 2: token dropping needs 4"):
        SCTDPretrainModule(backbone=tiny()).configure_model()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="backbone: give config.vocab_size or tokenizer"):
        SCTDPretrainModule(backbone={"config": deep(tiny())["config"]}).configure_model()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="optim.non_finite = 'go': must be stop or skip"):
        build(SCTDPretrainModule, optim={"non_finite": "go"})


def test_a_corpus_that_does_not_fit_the_model() -> None:
    source = data(method=SCTDPretrainModule)
    small = deep(tiny())
    module = build(SCTDPretrainModule, backbone={**small, "config": {**small["config"], "vocab_size": 20}})
    with pytest.raises(UsageError, match=r"data.tokenizer: has 40 words, the backbone embeds 20 \(config.vocab_size\)"):
        trainer(max_steps=1).fit(module, datamodule=source)
    module = build(SCTDPretrainModule, backbone={**small, "config": {**small["config"], "max_position_embeddings": 8}})
    with pytest.raises(UsageError, match="data.block_size = 16: the backbone has 8 positions"):
        trainer(max_steps=1).fit(module, datamodule=source)


def test_another_tokenizer_than_the_checkpoints(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).fit(build(SCTDPretrainModule), datamodule=data(method=SCTDPretrainModule))
    corpus = str(toy_corpus((("train", 256), ("validation", 32), ("test", 32))))
    module = SCTDPretrainModule(backbone={"config": {**deep(tiny())["config"], "vocab_size": 64}}, drop={"interval": 3})  # type: ignore[arg-type]
    other = MLMDataModule(inputs=corpus, block_size=16, batch_size=16, vocab_size=300)
    with pytest.raises((CheckpointError, UsageError), match="another tokenizer|belongs to another"):
        trainer(max_steps=3).fit(module, datamodule=other, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)


def test_documents_keep_apart_in_training() -> None:
    module = build(SCTDPretrainModule)
    source = data(method=SCTDPretrainModule, separate_documents=True)
    trainer(max_steps=4).fit(module, datamodule=source)
    batch = next(iter(source.train_dataloader()))
    assert "documents" in batch
    seen = module.sight(batch)
    assert seen is not None and seen.shape == (16, 16, 16) and seen.diagonal(dim1=1, dim2=2).all()


def test_two_graphs_are_all_that_training_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ordinary and one semantic-consistent, over validations, accumulation and the end of an epoch."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=counter, fullgraph=True, **options))
    ends = []
    for setting in (False, True):
        torch._dynamo.reset()
        module = build(SCTDPretrainModule, dropout=0.0, backbone=tiny(0.0, compile=setting))
        source = data(batch_size=8, method=SCTDPretrainModule)
        options: dict[str, Any] = {"max_steps": 18, "max_epochs": -1, "accumulate_grad_batches": 2}
        trainer(tmp_path / str(setting), val_check_interval=8, **options).fit(module, datamodule=source)
        ends.append(
            [float(row["train/loss"]) for row in MetricsCSV(tmp_path / str(setting)).read() if "train/loss" in row]
        )
    assert counter.frame_count == 2
    assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def scaled(optim: dict[str, Any]) -> tuple[Any, Any]:
    """A module, and a plugin that scales losses as 16-mixed does on a GPU."""
    from lightning.pytorch.plugins import MixedPrecision

    return build(SCTDPretrainModule, optim=optim), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_skipping_with_a_scaler(clip: float | None) -> None:
    module, plugin = scaled({"lr": 1e-3, "non_finite": "skip"})
    module.configure_model()
    with torch.no_grad():
        module.model.bert.embeddings.word_embeddings.weight[39] = torch.inf
        module.model.cls.predictions.decoder.weight = torch.nn.Parameter(torch.randn(64, 32) / 6)
    trainer(max_steps=6, plugins=[plugin], gradient_clip_val=clip).fit(module, poisoned(1))
    assert module.skipped_steps == 1
    rows = [name for name, p in module.trainable_parameters().items() if not torch.isfinite(p).all()]
    assert rows == ["model.bert.embeddings.word_embeddings.weight"]  # as it was set


def test_ten_skipped_steps_in_a_row_stop() -> None:
    module = build(SCTDPretrainModule, optim={"lr": 1e-3, "non_finite": "skip"})
    module.configure_model()
    with torch.no_grad():
        module.model.bert.embeddings.LayerNorm.weight[0] = torch.nan
    with pytest.raises(PeftLightningError, match=r"loss is nan at step 10 \(10 such steps in a row\)"):
        trainer(max_steps=20).fit(module, datamodule=data(method=SCTDPretrainModule))
    assert module.skipped_steps == 9


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_special_numbers_are_the_tokenizers(family: str, tmp_path: Path) -> None:
    setting = deep(tiny())
    backbone = {"config": {**setting["config"], "model_type": family}}
    module = SCTDPretrainModule(backbone=backbone, drop={"interval": 2})  # type: ignore[arg-type]
    corpus = str(toy_corpus((("train", 256), ("validation", 32), ("test", 32))))
    source = MLMDataModule(inputs=corpus, block_size=16, batch_size=8, vocab_size=300)
    trainer(max_steps=2).fit(module, datamodule=source)
    config: Any = module.model.config
    words = source.tokenizer
    assert config.pad_token_id == words.pad_token_id == module.engine.bare.embeddings.word_embeddings.padding_idx
    assert (config.bos_token_id, config.eos_token_id) == (words.cls_token_id, words.sep_token_id)
    with pytest.raises(UsageError, match=r"takes token 3 for padding, '\[SEP\]' in the tokenizer, whose own is 0"):
        wrong = {"config": {**backbone["config"], "pad_token_id": 3}}
        trainer(max_steps=1).fit(SCTDPretrainModule(backbone=wrong), datamodule=source)  # type: ignore[arg-type]


def test_a_copy_of_a_compiled_module_trains_itself() -> None:
    import copy

    module = build(SCTDPretrainModule, dropout=0.0, backbone=tiny(0.0, compile=True))
    module.configure_model()
    used: list[int] = []

    def compiled(call: Any, **options: Any) -> Any:
        def run(*args: Any, **more: Any) -> Any:
            used.append(id(call.__self__))
            return call(*args, **more)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        for one in (module, copy.deepcopy(module), module):
            one.losses(batch_of(), "dropping")[0].backward()
            assert used[-1] == id(one.engine)
    assert len(used) == 3 and len(set(used)) == 2


def test_what_a_broken_fit_collected_is_gone() -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if args[-1] == 2:
                raise KeyError("stop")

    weights: list[int] = []

    class Count(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            weights.append(len(pl_module._weights))

    module, source = build(SCTDPretrainModule), data(batch_size=8, method=SCTDPretrainModule)
    with pytest.raises(KeyError):
        trainer(max_steps=4, accumulate_grad_batches=4, callbacks=[Stop()]).fit(module, datamodule=source)
    assert module._weights and module.importance.sums.any()
    trainer(max_steps=2, accumulate_grad_batches=4, callbacks=[Count()]).fit(module, datamodule=source)
    assert weights == [4, 4]


def test_a_warm_started_checkpoint_stands_alone(tmp_path: Path) -> None:
    first = build(SCTDPretrainModule)
    first.configure_model()
    first.export(tmp_path / "first")
    module = SCTDPretrainModule(backbone=str(tmp_path / "first"), drop={"interval": 3})  # type: ignore[arg-type]
    source = MLMDataModule(inputs=data(method=SCTDPretrainModule).inputs, block_size=16, batch_size=16)
    trainer(tmp_path / "run", max_steps=3).fit(module, datamodule=source)
    (tmp_path / "first").rename(tmp_path / "moved")
    again = load(tmp_path / "run" / "last.ckpt")
    for name, tensor in module.owned_state().items():
        assert torch.equal(again.owned_state()[name], tensor), name
    assert again.tokenizer.get_vocab() == module.tokenizer.get_vocab()


def test_settings_reach_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_lightning.functional.masked_lm import masked_lm_loss

    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "peft_lightning.methods.sctd.masked_lm_loss", lambda *a, **o: seen.update(o) or masked_lm_loss(*a, **o)
    )
    module = build(SCTDPretrainModule, chunk=7, drop={"share_prefix": False, "sparse_last": False, "detach": False})
    module.configure_model()
    run = module.engine
    monkeypatch.setattr(module, "engine", Recording(run, seen))
    module.losses(batch_of(), "both")
    assert (seen["chunk"], seen["detach"], seen["share_prefix"], seen["sparse_last"]) == (7, False, False, False)


class Recording:
    """Stands for the engine and notes what it is called with."""

    def __init__(self, engine: Any, seen: dict[str, Any]) -> None:
        self._engine, self._seen = engine, seen

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._seen.update(options)
        return self._engine(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize("preset", PRESETS)
def test_work_counts_what_is_computed(preset: str) -> None:
    """Against torch's own count of a step's forward pass (attention's products on a CPU are not counted there)."""
    from torch.utils.flop_counter import FlopCounterMode

    interval = {} if preset in ("mlm", "token-drop") else {"interval": 1}
    module, source = build(SCTDPretrainModule, drop={"preset": preset, **interval}), data(method=SCTDPretrainModule)
    done: list[dict[str, Any]] = []

    class Ask(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
            done.append(pl_module.work(batch))

    trainer(max_steps=1, callbacks=[Ask()]).fit(module, datamodule=source)
    batch = next(iter(source.train_dataloader()))
    passes = module.drop.passes(1)
    assert done[0]["kind"] == passes and done[0]["teacher"] == (passes == "both")
    assert done[0]["tokens"] == batch["input_ids"].numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.losses(batch, passes)
    forward = done[0]["flops"] / 3
    # the fused loss makes three products more of the head's last one for each pass that learns; attention is left out
    assert 0.4 < counter.get_total_flops() / forward < 2.5
