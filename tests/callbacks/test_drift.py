"""The drift in the course of a fit: when it is measured, on what, and that training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from peft_lightning.analysis.drift import drift_scores, drift_sums
from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.callbacks.drift import Drift
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.callbacks.throughput import Throughput
from peft_lightning.errors import UsageError
from peft_lightning.functional.tokens import select_tokens
from peft_lightning.layers.drop_config import DropConfig
from peft_lightning.layers.token_drop import TokenDrop
from peft_lightning.methods.sctd import SCTDPretrainModule
from tests.analysis.test_drift import K, S, blocks, model
from tests.analysis.test_encoder import folder
from tests.toy import trainer


@pytest.fixture(autouse=True)
def _draw_seldom(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else here; one test looks at them."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("peft_lightning.callbacks.drift.draw_curves", lambda *args, **options: None)


class Pretraining(L.LightningModule):
    """Trains with dropout, whose random numbers are the process's."""

    drops = True
    tokenizer: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.model = model()
        self.model.bert.embeddings.dropout.eval()  # a mode of its own
        self.engine = TokenDrop(self.model)

    def choose(self, ids: Tensor, noise: Tensor) -> Tensor:
        torch.rand(3)  # whatever a method may draw
        return select_tokens(ids.float(), K, noise)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        passes = self.engine(batch["input_ids"], batch["targets"], None, full=True)
        return F.cross_entropy(
            self.engine.logits(cast(Tensor, passes.teacher)).flatten(0, 1), batch["labels"].flatten()
        )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Corpus(L.LightningDataModule):
    """Five training batches, and eight validation blocks in batches of three: a last row does not count."""

    def train_dataloader(self) -> Any:
        return loader([blocks(4, seed=seed) for seed in range(5)])

    def val_dataloader(self) -> Any:
        last = blocks(3, 12, 6)
        last["valid"][2] = False
        return loader([blocks(3, 10, 0), blocks(3, 11, 3), last])


def loader(batches: list[dict[str, Tensor]]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def fit(root: Path, steps: int, callbacks: list[Any], **options: Any) -> Pretraining:
    torch.manual_seed(1)
    module = Pretraining()
    last = root / "last.ckpt"
    run = trainer(root, max_steps=steps, callbacks=callbacks, default_root_dir=str(root), **options)
    run.fit(module, datamodule=Corpus(), ckpt_path=str(last) if last.exists() else None, weights_only=True)
    assert module.training and not module.model.bert.embeddings.dropout.training
    return module


def test_a_series_its_file_and_its_picture(tmp_path: Path) -> None:
    fit(tmp_path, 5, [drift := Drift(2, rows=7)], val_check_interval=2)
    assert [row["step"] for row in drift.series] == [0, 2, 4]
    report = json.loads((tmp_path / "drift.json").read_text())
    assert report["series"] == drift.series and report["rows"] == 7 and report["encoder"] is None
    assert [row["step"] for row in report["validation"]] == [2, 4] and "val/loss" in report["validation"][0]
    assert drift.series[0]["own_full"] != drift.series[2]["own_full"]
    with Image.open(tmp_path / "drift.png") as picture:
        assert picture.width > 1000  # the cosine, the gap, and the validation loss
    (tmp_path / "drift.png").unlink()
    few = Drift(9, rows=7)
    few.series = drift.series[:1]
    few._write(SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path))  # type: ignore[arg-type]
    assert not (tmp_path / "drift.png").exists()  # one point makes no line
    rows = [row for row in MetricsCSV(tmp_path).read() if "drift/own_full" in row]
    assert [(int(row["step"]), float(row["drift/own_dropped"])) for row in rows] == [
        (row["step"], row["own_dropped"]) for row in drift.series
    ]


def test_it_is_the_measure_of_the_first_blocks(tmp_path: Path) -> None:
    drift = Drift(100, rows=7)
    fit(tmp_path, 1, [drift])
    torch.manual_seed(1)
    start = Pretraining().eval()
    parts = [*Corpus().val_dataloader()]
    seven = {name: torch.cat([part[name] for part in parts])[:7] for name in parts[0]}
    expected = drift_scores(drift_sums(start, seven))
    assert drift.series == [{"step": 0, **{name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}}]


def test_training_does_not_notice(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", 4, [])
    watched = fit(tmp_path / "watched", 4, [Drift(1, rows=4)])
    for one, two in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not any(parameter.grad is None for parameter in watched.model.bert.encoder.parameters())


def test_it_does_not_count_as_training_time(tmp_path: Path) -> None:
    class Paused(Throughput):
        times = 0

        def pause(self) -> None:
            self.times += 1
            super().pause()

    plain, watched = Paused(), Paused()
    fit(tmp_path / "plain", 4, [plain])
    fit(tmp_path / "watched", 4, [watched, Drift(2, rows=4)])
    assert watched.times == plain.times + 3  # at steps 0, 2 and 4


def test_a_run_that_goes_on_has_the_same_series(tmp_path: Path) -> None:
    # stopped at a step that is measured, and at one that is not
    for every, steps, end in ((2, 3, [0, 2, 4]), (1, 2, [0, 1, 2, 3, 4, 5])):
        root = tmp_path / str(every)
        before = Drift(every, rows=4)
        fit(root, steps, [before], every_n_steps=1)
        first = [dict(row) for row in before.series]
        after = Drift(every, rows=4)
        fit(root, 5, [after], every_n_steps=1)
        assert after.series[: len(first)] == first and [row["step"] for row in after.series] == end
        assert json.loads((root / "drift.json").read_text())["series"] == after.series


def test_two_ranks_measure_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Pretraining().eval()
    parts = [*Corpus().val_dataloader()]
    everything = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    sent: dict[int, Tensor] = {}

    def chosen(rank: int) -> list[dict[str, Tensor]]:
        """A rank's blocks: it has every second one."""
        rows = [[rank, rank + 2], [rank + 4, rank + 6], [8]]

        def all_gather(mine: Tensor) -> Tensor:
            sent[rank] = mine
            return torch.stack([sent.get(0, mine), sent.get(1, mine)])

        share = loader([{name: values[part] for name, values in everything.items()} for part in rows])
        fake: Any = SimpleNamespace(
            datamodule=SimpleNamespace(val_dataloader=lambda: share),
            enable_validation=True,
            strategy=SimpleNamespace(root_device="cpu", all_gather=all_gather),
        )
        return Drift(1, rows=5)._choose(fake)

    chosen(0), chosen(1)  # so that each knows what the other sends
    one: Any = SimpleNamespace(world_size=1)
    found = [Drift._over_ranks(one, [drift_sums(module, b) for b in chosen(rank)]) for rank in (0, 1)]
    assert [float(part["count"]) for part in found] == [3, 2]  # blocks 0, 2, 4 and 1, 3

    def gather(into: list[Any], mine: Any) -> None:
        into[:] = [*found, mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    third: Any = SimpleNamespace(world_size=3)  # has no blocks at all
    together = drift_scores(Drift._over_ranks(third, []))
    expected = drift_scores(drift_sums(module, {name: values[:5] for name, values in everything.items()}))
    assert together == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}


def test_with_a_sentence_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_lightning.backbones.toy import toy_tokenizer

    monkeypatch.setattr(Pretraining, "tokenizer", toy_tokenizer())
    encoder = folder(tmp_path / "encoder")
    fit(tmp_path / "run", 2, [drift := Drift(2, rows=4, encoder=encoder)])
    assert {"text_full", "text_dropped", "text_masked", "text_kept", "text_unrelated"} < drift.series[1].keys()
    assert drift.series[0]["text_masked"] == drift.series[1]["text_masked"]  # the encoder does not change
    assert json.loads((tmp_path / "run" / "drift.json").read_text())["encoder"] == encoder
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert not [name for name in state["state_dict"] if not name.startswith("model.")]


@pytest.mark.parametrize(("preset", "shares"), [("sctd", 0.25), ("mlm", 0.0)])
def test_the_pretraining_method_gives_what_both_callbacks_ask_for(preset: str, shares: float, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 32}
    module = SCTDPretrainModule(
        backbone=BackboneConfig(config={"model_type": "bert", "max_position_embeddings": S, **sizes}, tokenizer="toy"),
        drop=DropConfig(preset=preset, interval=4 if preset == "sctd" else None),
    )
    drift, speed = Drift(2, rows=7, encoder=folder(tmp_path / "encoder")), Throughput(2)
    run = trainer(tmp_path / "run", max_steps=4, callbacks=[speed, drift], default_root_dir=str(tmp_path / "run"))
    run.fit(module, datamodule=Corpus())
    assert [row["step"] for row in drift.series] == [0, 2, 4]
    assert ("text_dropped" in drift.series[0]) == ("own_dropped" in drift.series[0]) == module.drops
    assert speed.totals["teacher_share"] == shares and speed.totals["tokens"] == 4 * 4 * S


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every_n_steps = 0: must be at least 1"):
        Drift(0)
    with pytest.raises(UsageError, match="rows = 1: must be at least 2"):
        Drift(1, rows=1)
    with pytest.raises(UsageError, match="Drift: needs a validation split"):
        fit(tmp_path, 1, [Drift(1)], limit_val_batches=0)
    with pytest.raises(UsageError, match="ghost"):
        fit(tmp_path, 1, [Drift(1, encoder=str(tmp_path / "ghost"))])
