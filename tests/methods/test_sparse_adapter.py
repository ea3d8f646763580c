"""SparseAdapter: the masks are those of the definition, exact in number, made once, and leave no trace."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from peft_lightning import SparseAdapterModule
from peft_lightning.errors import UsageError
from peft_lightning.functional.sparsify import DegenerateScoreError, kept_count
from tests.toy import build, data, tiny, trainer


def batches(count: int) -> list[Any]:
    source = data(batch_size=8)
    source.prepare_data()
    source.setup("fit")
    return list(islice(source.train_dataloader(), count))


def module(**options: Any) -> SparseAdapterModule:
    built: SparseAdapterModule = build(SparseAdapterModule, **options)
    built.configure_model()
    return built


def masks(m: SparseAdapterModule) -> dict[str, Tensor]:
    return {name: layer.mask for name, layer in m.prunable().items() if layer.mask is not None}


def test_snip_masks_follow_the_finite_differences_of_the_real_loss() -> None:
    """dL/dm by moving single mask entries of the whole model in fp64, on a sample of entries."""
    m = module(dropout=0.1, adapter={"bottleneck": 4, "init_std": 0.3}, prune={"sparsity": 0.5})
    m.double()
    scoring = batches(3)
    weights = {name: layer.weight for name, layer in m.prunable().items()}
    gradients = m._mean_gradients(weights, scoring)
    m.eval()

    def mean_loss() -> float:
        with torch.no_grad():
            sums = [m.batch_loss(batch) for batch in scoring]
        return float(sum(s for s, _ in sums)) / float(sum(w for _, w in sums))

    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        for i in torch.randperm(weight.numel(), generator=generator)[:4].tolist():
            old = weight.detach().view(-1)[i].clone()
            values = []
            for sign in (1, -1):
                weight.data.view(-1)[i] = old * (1 + sign * 1e-4)
                values.append(mean_loss())
            weight.data.view(-1)[i] = old
            slope = (values[0] - values[1]) / 2e-4
            assert_close(float(old * gradients[name].view(-1)[i]), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("score", ["snip", "magnitude"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_counts_are_exact(score: str, scope: str) -> None:
    m = module(prune={"sparsity": 0.37, "score": score, "scope": scope})
    m.install_masks(batches(2))
    total = sum(mask.numel() for mask in masks(m).values())
    if scope == "global":
        assert m.summary()["kept_weights"] == kept_count(total, 0.37)
    else:
        assert all(int(mask.sum()) == kept_count(mask.numel(), 0.37) for mask in masks(m).values())
    removed = {name: layer.weight[~masks(m)[name]] for name, layer in m.prunable().items()}
    assert all((weight == 0).all() for weight in removed.values())


def test_trained_parameters_are_counted_without_the_removed() -> None:
    m = module(prune={"sparsity": 0.4})
    before = m.summary()
    m.install_masks(batches(1))
    after = m.summary()
    assert (
        before["trained_parameters"] - after["trained_parameters"] == before["prunable_weights"] - after["kept_weights"]
    )
    assert before["trained_parameters"] == sum(p.numel() for p in m.trainable_parameters().values())
    assert after["kept_share"] == pytest.approx(0.6, abs=1e-4)


def test_scoring_leaves_no_gradient_and_restores_every_mode() -> None:
    m = module()
    m.train()
    m.backbone.get_submodule("encoder.layer.0").eval()
    modes = {name: part.training for name, part in m.named_modules()}
    m.install_masks(batches(2))
    assert {name: part.training for name, part in m.named_modules()} == modes
    assert all(p.grad is None for p in m.parameters())


def test_dropout_does_not_touch_the_scores() -> None:
    one, two = module(dropout=0.5), module(dropout=0.5)
    one.install_masks(batches(2))
    torch.manual_seed(99)
    two.install_masks(batches(2))
    for name, mask in masks(one).items():
        assert torch.equal(mask, masks(two)[name])


def test_fit_scores_on_the_first_batches_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = module(prune={"sparsity": 0.5, "score_batches": 3})
    expected.install_masks(batches(3))
    m = module(prune={"sparsity": 0.5, "score_batches": 3})
    trainer(max_steps=1).fit(m, datamodule=data(batch_size=8))
    for name, mask in masks(expected).items():
        assert torch.equal(masks(m)[name], mask)
    plain = module(prune={"sparsity": 0.5, "score_batches": 3})
    trainer(max_steps=1).fit(plain, DataLoader(batches(5), batch_size=None))  # type: ignore[arg-type]
    for name, mask in masks(expected).items():
        assert torch.equal(masks(plain)[name], mask)


def test_a_resumed_run_keeps_its_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = module()
    trainer(tmp_path, max_steps=3).fit(m, datamodule=data(batch_size=8))
    monkeypatch.setattr(SparseAdapterModule, "install_masks", lambda *_: pytest.fail("scored again"))
    again = module()
    trainer(tmp_path, max_steps=6).fit(
        again, datamodule=data(batch_size=8), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True
    )
    for name, mask in masks(m).items():
        assert torch.equal(masks(again)[name], mask)


def test_dense_has_no_masks_and_no_scoring() -> None:
    m = module(prune={"sparsity": 0.0})
    assert not masks(m)
    trainer(max_steps=1).fit(m, datamodule=data(batch_size=8))
    assert m.summary()["kept_share"] == 1.0


def test_zero_initialised_adapters_are_refused_with_the_remedy() -> None:
    for score in ("snip", "magnitude"):
        m = module(adapter={"init_std": 0.0}, prune={"score": score})
        with pytest.raises(DegenerateScoreError, match="initialise these tensors away from zero"):
            m.install_masks(batches(1))


def test_nothing_to_score_on() -> None:
    with pytest.raises(UsageError, match="no training batch to score on"):
        module().install_masks([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": {"sparsity": 1.0}}, r"sparsity = 1\.0: must be the share removed"),
        ({"prune": {"score": "best"}}, "score = 'best': must be snip or magnitude"),
        ({"prune": {"scope": "layer"}}, "scope = 'layer': must be global or tensor"),
        ({"prune": {"score_batches": 0}}, "score_batches = 0: must be at least 1"),
        ({"adapter": {"bottleneck": 0}}, "bottleneck = 0: must be at least 1"),
        ({"adapter": {"target": "decoder"}}, "matches no site; there are: encoder.layer.0.attention.output"),
        ({"adapter": {"ghost": 1}}, "AdapterConfig: .*ghost"),
        (
            {"backbone": {**tiny(), "config": {"model_type": "gpt2"}}},
            "backbone of type 'gpt2': adapters know",
        ),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module(**options)
