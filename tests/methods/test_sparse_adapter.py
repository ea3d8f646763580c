"""SparseAdapter: the masks are those of the definition, exact in number, made once, and leave no trace."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from peft_lightning import SparseAdapterModule, load
from peft_lightning.errors import CheckpointError, PeftLightningError, UsageError
from peft_lightning.files.manifest import MANIFEST_KEY
from peft_lightning.functional.sparsify import DegenerateScoreError, kept_count
from peft_lightning.layers.still import held_still
from tests.families import backbone_setting
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
    weights: dict[str, Tensor] = {name: parameter.weight for name, parameter in m.prunable().items()}
    with held_still(m):
        scores = m._scores(m.prunable(), scoring)
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
            assert_close(float(scores[name].view(-1)[i]), abs(slope), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("score", ["random", "magnitude", "snip", "grasp"])
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
        assert not again.prunable()[name].weight[~mask].any()


def test_dense_has_no_masks_and_no_scoring() -> None:
    m = module(prune={"sparsity": 0.0})
    assert not masks(m)
    trainer(max_steps=1).fit(m, datamodule=data(batch_size=8))
    assert m.summary()["kept_share"] == 1.0


KINDS = ("houlsby", "pfeiffer", "parallel", "lora", "mam")
SCORES = ("random", "magnitude", "er", "snip", "grasp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_prunes_every_kind_exactly(kind: str, score: str) -> None:
    m = module(adapter={"kind": kind, "bottleneck": 6}, prune={"sparsity": 0.37, "score": score})
    before = {name: p.weight.detach().clone() for name, p in m.prunable().items()}
    m.install_masks(batches(2))
    total = sum(weight.numel() for weight in before.values())
    assert sum(int(mask.sum()) for mask in masks(m).values()) == kept_count(total, 0.37)
    for name, parameter in m.prunable().items():
        assert torch.equal(parameter.weight, before[name] * masks(m)[name]), "the kept weights are the initial ones"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiplier", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"scope": "tensor"}, {"score": "er"}], ids=str)
def test_large_sparse_trains_as_many_parameters_as_the_dense_adapter(
    kind: str, multiplier: int, options: dict[str, Any]
) -> None:
    adapter = {"kind": kind, "bottleneck": 6}
    dense = module(adapter=adapter, prune={"sparsity": 0.0}).summary()
    m = module(adapter=adapter, prune={"multiplier": multiplier, "score": "random", **options})
    m.install_masks(())
    wide = m.summary()
    assert wide["prunable_weights"] == multiplier * dense["prunable_weights"]
    assert wide["adapter_parameters"] == dense["adapter_parameters"]
    assert wide["trained_parameters"] == dense["trained_parameters"]


def test_erdos_renyi_makes_larger_matrices_sparser() -> None:
    adapter = {"kind": "lora", "bottleneck": 8, "target": "intermediate|query"}
    m = module(adapter=adapter, prune={"sparsity": 0.5, "score": "er"})
    m.install_masks(())
    density = {(mask.shape): float(mask.float().mean()) for mask in masks(m).values()}
    small, large = density[torch.Size([8, 32])], density[torch.Size([64, 8])]
    assert small / large == pytest.approx((40 / 256) / (72 / 512), abs=0.02)


def test_grasp_keeps_what_its_definition_keeps() -> None:
    """w * (H g) with H by finite differences of the gradient along g, in fp64, through the whole model."""
    m = module(dropout=0.0, adapter={"bottleneck": 4, "init_std": 0.3}, prune={"sparsity": 0.5, "score": "grasp"})
    m.double().eval()
    scoring = batches(2)
    weights = {name: p.weight for name, p in m.prunable().items()}

    def gradient() -> list[Tensor]:
        sums = [m.batch_loss(batch) for batch in scoring]
        loss = torch.stack([s for s, _ in sums]).sum() / torch.stack([w for _, w in sums]).sum()
        return list(torch.autograd.grad(loss, list(weights.values())))

    start, ends, step = gradient(), [], 1e-4
    for sign in (1, -2):
        for weight, g in zip(weights.values(), start, strict=True):
            weight.data.add_(g, alpha=sign * step)
        ends.append(gradient())
    for weight, g in zip(weights.values(), start, strict=True):
        weight.data.add_(g, alpha=step)
    with held_still(m):
        scores = m._scores(m.prunable(), scoring)
    for name, high, low in zip(weights, *ends, strict=True):
        expected = weights[name].detach() * (high - low) / (2 * step)
        assert_close(scores[name].double(), expected, rtol=1e-3, atol=1e-7)


def test_scores_are_those_of_fp32_in_a_bf16_backbone_and_leave_it_as_it_was() -> None:
    half = module(backbone=tiny(dtype="bfloat16"), prune={"sparsity": 0.5})
    full = module(backbone=tiny(dtype="bfloat16"), prune={"sparsity": 0.5})
    full.backbone.float()
    before = {name: tensor.clone() for name, tensor in half.backbone.named_parameters() if "adapters" not in name}
    half.install_masks(batches(2))
    full.install_masks(batches(2))
    for name, mask in masks(full).items():
        assert torch.equal(masks(half)[name], mask)
    for name, tensor in half.backbone.named_parameters():
        if "adapters" not in name:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name])


@pytest.mark.parametrize("score", ["snip", "magnitude", "grasp"])
def test_scores_that_rank_nothing_are_refused_with_the_remedy(score: str) -> None:
    m = module(adapter={"kind": "lora"}, prune={"score": score, "score_init": "as_is"})
    with pytest.raises(DegenerateScoreError, match=r"encoder\.layer\.0.*prune\.score_init = surrogate"):
        m.install_masks(batches(1))


@pytest.mark.parametrize("score_init", ["surrogate", "warmup"])
@pytest.mark.parametrize("score", ["snip", "magnitude", "grasp"])
def test_lora_is_scored_away_from_zero_and_starts_from_zero(score: str, score_init: str) -> None:
    m = module(adapter={"kind": "lora", "bottleneck": 4}, prune={"score": score, "score_init": score_init})
    head = {name: tensor.clone() for name, tensor in m.head.state_dict().items()}
    m.install_masks(batches(2))
    kept = {end: sum(int(v.sum()) for n, v in masks(m).items() if n.endswith(end)) for end in ("lora_A", "lora_B")}
    assert min(kept.values()) > 0
    assert all(not p.weight.any() for name, p in m.prunable().items() if name.endswith("lora_B"))
    assert all(torch.equal(tensor, head[name]) for name, tensor in m.head.state_dict().items())
    assert all(p.grad is None for p in m.parameters())


def test_warming_up_is_adam_on_the_scoring_batches() -> None:
    m = module(dropout=0.3, prune={"score_init": "warmup", "warmup_steps": 3}, optim={"lr": 1e-2})
    twin = module(dropout=0.3, optim={"lr": 1e-2})
    scoring = batches(2)
    with held_still(m):
        m._scores(m.prunable(), scoring)
        warmed = {name: p.detach().clone() for name, p in m.trainable_parameters().items()}
    optimizer = torch.optim.Adam(twin.trainable_parameters().values(), lr=1e-2)
    twin.eval()
    for step in range(3):
        loss, weight = twin.batch_loss(scoring[step % 2])
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in twin.trainable_parameters().items():
        assert_close(warmed[name], parameter)


def test_zeroed_entries_stay_zero_in_training_with_decay_and_bf16() -> None:
    for kind in KINDS:
        m = module(
            adapter={"kind": kind, "bottleneck": 4},
            backbone=tiny(dtype="bfloat16"),
            optim={"lr": 1e-2, "weight_decay": 0.5},
        )
        trainer(max_steps=5, precision="bf16-mixed").fit(m, datamodule=data(batch_size=8))
        for name, mask in masks(m).items():
            weight = m.prunable()[name].weight
            assert not weight[~mask].any(), name
            assert weight[mask].any(), name


def test_scoring_a_compiled_backbone_uses_the_plain_one() -> None:
    plain, compiled = (module(backbone=tiny(compile=value), prune={"score": "grasp"}) for value in (False, True))
    for m in (plain, compiled):
        m.install_masks(batches(1))
    assert compiled.backbone._compiled_call_impl is not None
    for name, mask in masks(plain).items():
        assert torch.equal(masks(compiled)[name], mask)


def test_the_report_says_what_was_changed() -> None:
    summary = module(adapter={"kind": "pfeiffer", "name": "mine"}).summary()
    assert summary["adapters"] == {
        "kind": "pfeiffer",
        "sites": ["encoder.layer.0.output.adapters.mine", "encoder.layer.1.output.adapters.mine"],
    }


def test_a_checkpoint_from_before_the_pruning_does_not_count_as_pruned(tmp_path: Path) -> None:
    early = module()
    fit = trainer(max_steps=1, limit_val_batches=1)
    fit.validate(early, datamodule=data(batch_size=8), verbose=False)
    fit.save_checkpoint(tmp_path / "early.ckpt")
    again = module()
    trainer(max_steps=2).fit(
        again, datamodule=data(batch_size=8), ckpt_path=str(tmp_path / "early.ckpt"), weights_only=True
    )
    assert again.summary()["kept_share"] == pytest.approx(0.6, abs=1e-3)


def test_looking_for_a_learning_rate_leaves_a_module_that_is_pruned_in_its_fit() -> None:
    m = module()
    search = trainer(max_steps=6, limit_val_batches=0)
    Tuner(search).lr_find(m, datamodule=data(batch_size=8), num_training=5, update_attr=False)
    trainer(max_steps=2).fit(m, datamodule=data(batch_size=8))
    assert m.summary()["kept_share"] == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("score", SCORES)
def test_scoring_does_not_change_the_order_of_a_loader_of_ones_own(score: str) -> None:
    seen: list[int] = []

    class Spy(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            seen.append(int(batch["inputs"]["input_ids"].sum()))

    L.seed_everything(7, verbose=False)
    loader: Any = DataLoader(batches(6), batch_size=None, shuffle=True)  # type: ignore[arg-type]
    trainer(max_steps=6, callbacks=[Spy()]).fit(module(prune={"score": score, "sparsity": 0.5}), loader)
    L.seed_everything(7, verbose=False)
    expected = [int(batch["inputs"]["input_ids"].sum()) for batch in _dense_order(loader)]
    assert seen == expected


def _dense_order(loader: Any) -> list[Any]:
    """The batches of a fit that scores nothing."""
    order: list[Any] = []

    class Spy(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            order.append(batch)

    trainer(max_steps=6, callbacks=[Spy()]).fit(module(prune={"sparsity": 0.0}), loader)
    return order


def test_given_masks_come_with_a_file() -> None:
    with pytest.raises(UsageError, match="prune.score = 'given': masks that come with a file, and there are none"):
        module(prune={"score": "given"}).install_masks(())


def test_nothing_to_score_on() -> None:
    with pytest.raises(UsageError, match="there must be training data; or choose a score that needs none"):
        module().install_masks([])
    with pytest.raises(UsageError, match="prune.score_init = 'warmup': there is no training batch"):
        module(prune={"score_init": "warmup"}).install_masks([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": {"sparsity": 1.0}}, r"sparsity = 1\.0: must be the share removed"),
        ({"prune": {"score": "best"}}, "prune.score = 'best': must be random, magnitude, er, snip, grasp, given"),
        ({"prune": {"scope": "layer"}}, "prune.scope = 'layer': must be global, tensor"),
        ({"prune": {"score_init": "cold"}}, "prune.score_init = 'cold': must be as_is, surrogate, warmup"),
        ({"prune": {"score_batches": 0}}, "prune.score_batches = 0: must be at least 1"),
        ({"prune": {"warmup_steps": 0}}, "prune.warmup_steps = 0: must be at least 1"),
        ({"prune": {"multiplier": 2.0}}, r"prune.multiplier = 2\.0: must be of type int"),
        ({"prune": {"multiplier": 5}}, "prune.multiplier = 5: must be 1, 2, 3, 4"),
        ({"prune": {"multiplier": 2, "sparsity": 0.5}}, r"sparsity = 0\.5: follows from prune.multiplier = 2"),
        ({"adapter": {"bottleneck": 0}}, "bottleneck = 0: must be at least 1"),
        ({"adapter": {"target": "decoder"}}, "matches no site; there are: encoder.layer.0.attention.output"),
        ({"adapter": {"ghost": 1}}, "AdapterConfig has no option .ghost"),
        (
            {"backbone": {**tiny(), "config": {"model_type": "gpt2"}}},
            "backbone of type 'gpt2': adapters and pruning know",
        ),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module(**options)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (backbone_setting("roberta"), "belongs to another backbone .*model_type bert here roberta"),
        (backbone_setting("bert"), "belongs to another backbone .*hidden_size 32 here 16"),
        ({**tiny(), "config": {**tiny()["config"], "num_hidden_layers": 1}}, "num_hidden_layers 2 here 1"),
        ({**tiny(), "config": {"model_type": "gpt2"}}, "belongs to another backbone .*model_type bert here gpt2"),
    ],
)
def test_the_backbone_is_compared_before_anything_is_attached(backbone: Any, message: str, tmp_path: Path) -> None:
    m = module(adapter={"kind": "mam", "bottleneck": 4, "target": r"layer\.1"})
    trainer(tmp_path, max_steps=1).fit(m, datamodule=data(batch_size=8))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "last.ckpt", backbone=backbone)


@pytest.mark.parametrize("change", [{"bottleneck": 10**12}, {"bottleneck": 4.0}, {"target": 3}, {"seed": 10**30}])
def test_a_file_with_impossible_settings_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1).fit(module(), datamodule=data(batch_size=8))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    values = content[MANIFEST_KEY]["hyper_parameters"]
    (values if "seed" in change else values["adapter"]).update(change)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(PeftLightningError, match="last.ckpt: .*(do not fit the method|must be )"):
        load(tmp_path / "last.ckpt")
