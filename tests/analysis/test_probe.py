"""Linear probes against scipy's optimum, on features whose content is known, and on a backbone end to end."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from peft_lightning.analysis import probe
from peft_lightning.analysis.encoder import FrozenEncoder
from peft_lightning.analysis.probe import fit_logistic, gaps, probe_backbone, probe_layer
from peft_lightning.analysis.sentences import Sentences
from tests.analysis.test_encoder import folder


def blobs(size: int, signal: float, seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Features [N, 6] whose first ones hold the label, by as much as ``signal``; classes of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.arange(1.0, classes + 1), size, replacement=True, generator=generator)
    noise = torch.randn(size, 6, generator=generator)
    noise[:, :classes] += signal * torch.nn.functional.one_hot(labels, classes)
    return noise, labels


def three(signal: float, size: int = 400) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = {split: blobs(size, signal, seed) for seed, split in enumerate(("tr", "va", "te"))}
    return {split: x for split, (x, _) in found.items()}, {split: y for split, (_, y) in found.items()}


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_fit_is_the_optimum(l2: float) -> None:
    x, labels = blobs(150, 1.0)
    x64, y = x.double().numpy(), labels.numpy()

    def objective(flat: np.ndarray) -> float:
        w = flat.reshape(3, 7)
        scores = x64 @ w[:, :6].T + w[:, 6]
        top = scores.max(1)
        loss = np.log(np.exp(scores - top[:, None]).sum(1)) + top - scores[np.arange(len(y)), y]
        return float(loss.mean() + l2 / 2 * (w[:, :6] ** 2).sum())

    best = minimize(objective, np.zeros(21), method="BFGS", options={"gtol": 1e-8})
    found = fit_logistic(x, labels, 3, l2)
    assert objective(found.double().numpy().ravel()) == pytest.approx(best.fun, abs=1e-6)
    expected = torch.from_numpy(best.x.reshape(3, 7)).float()
    # biases are determined up to a constant
    torch.testing.assert_close(found[:, :6], expected[:, :6], atol=5e-3, rtol=5e-3)
    again = fit_logistic(x, labels, 3, l2, torch.randn(3, 7))
    assert objective(again.double().numpy().ravel()) == pytest.approx(best.fun, abs=1e-6)


def test_a_layer_is_as_good_as_what_it_holds() -> None:
    found = {signal: probe_layer(*three(signal), 3) for signal in (0.0, 1.5, 12.0)}
    _, labels = three(0.0)
    majority = (labels["te"] == 2).double().mean().item()
    assert found[0.0].accuracy == pytest.approx(majority, abs=0.06)
    assert majority + 0.1 < found[1.5].accuracy < 0.98
    assert found[12.0].accuracy == 1.0
    for layer in found.values():
        assert layer.accuracy == layer.right.double().mean().item()


def test_the_strength_is_the_best_on_the_validation_split() -> None:
    features, labels = {}, {}
    for seed, (split, size) in enumerate((("tr", 60), ("va", 300), ("te", 300))):
        x, labels[split] = blobs(size, 1.0, seed)
        features[split] = torch.cat([x, torch.randn(size, 100, generator=torch.Generator().manual_seed(seed))], dim=1)
    found = probe_layer(features, labels, 3)
    mean, deviation = features["tr"].mean(0), features["tr"].std(0, correction=0)
    scaled = {split: (part - mean) / deviation for split, part in features.items()}
    shares = {}
    for l2 in probe.STRENGTHS:  # the strongest first, which wins among equals
        weights = fit_logistic(scaled["tr"], labels["tr"], 3, l2)
        shares[l2] = (
            ((scaled["va"] @ weights[:, :-1].T + weights[:, -1]).argmax(1) == labels["va"]).double().mean().item()
        )
    assert max(shares.values()) - min(shares.values()) > 0.02  # it matters
    assert found.validation == pytest.approx(max(shares.values()), abs=0.007)
    assert found.l2 == max(shares, key=lambda l2: shares[l2])


def test_scale_and_place_of_features_do_not_matter() -> None:
    features, labels = three(1.5)
    plain = probe_layer(features, labels, 3)
    stretched = {split: x * torch.tensor([1e-2, 1e3, 1.0, 1.0, 5.0, 1.0]) + 7 for split, x in features.items()}
    moved = probe_layer(stretched, labels, 3)
    assert (plain.right == moved.right).double().mean() > 0.99 and plain.l2 == moved.l2


def test_features_that_never_move_hold_nothing() -> None:
    features, labels = three(0.0)
    tiny = {split: 1 + 1e-7 * torch.nn.functional.one_hot(y, 6) for split, y in labels.items()}
    found = probe_layer(tiny, labels, 3)
    assert found.accuracy == (labels["te"] == 2).double().mean().item()


def toy_task(name: str = "polarity", seed: int = 0) -> Sentences:
    """Whether the last word is good or bad, which the mean of the word embeddings tells; more good ones than bad."""
    draw = random.Random(seed)
    texts: dict[str, list[str]] = {}
    labels: dict[str, list[int]] = {}
    for split, size in (("tr", 90), ("va", 40), ("te", 50)):
        labels[split] = [int(draw.random() < 0.7) for _ in range(size)]
        words = (("bad", "silly", "lazy"), ("good", "clever", "brave"))
        texts[split] = [
            " ".join([*draw.choices(("the", "this", "dog", "cat"), k=draw.randint(1, 6)), draw.choice(words[label])])
            for label in labels[split]
        ]
    return Sentences(name=name, classes=("bad", "good"), texts=texts, labels=labels)


def test_a_backbone(tmp_path: Path) -> None:
    encoder, task = FrozenEncoder(folder(tmp_path), batch_size=16), toy_task()
    found, draws = probe_backbone(encoder, task, pooling="mean", seed=1)
    assert [len(values) for values in found.values()] == [4] * 5 and draws.shape == (1000, 4)
    assert found["accuracy"][0] > 0.95
    first, _ = probe_backbone(encoder, task, pooling="first", seed=1)
    assert first["accuracy"][0] == task.majority  # the first token's embedding is always the same
    assert first["accuracy"][3] > task.majority  # layers above look at the others
    assert first["low"][0] < task.majority < first["high"][0]


def test_labels_without_sense_are_not_learned(tmp_path: Path) -> None:
    task = toy_task()
    draw = random.Random(5)
    labels = {split: draw.sample(values, len(values)) for split, values in task.labels.items()}
    shuffled = Sentences(name="x", classes=task.classes, texts=task.texts, labels=labels)
    found, _ = probe_backbone(FrozenEncoder(folder(tmp_path)), shuffled, pooling="mean", seed=1)
    assert max(found["accuracy"]) < shuffled.majority + 0.12


def test_intervals_and_gaps(tmp_path: Path) -> None:
    encoder, task = FrozenEncoder(folder(tmp_path)), toy_task()
    one, draws = probe_backbone(encoder, task, pooling="first", seed=3)
    two, again = probe_backbone(encoder, task, pooling="first", seed=3)
    assert one == two and torch.equal(draws, again)
    assert not torch.equal(draws, probe_backbone(encoder, task, pooling="first", seed=4)[1])
    # the same draws: nothing lies between a backbone and itself
    assert gaps(draws, again) == {"low": [0.0] * 4, "high": [0.0] * 4}
    share = one["accuracy"][0]
    width = 1.96 * (share * (1 - share) / len(task.texts["te"])) ** 0.5
    assert one["high"][0] - share == pytest.approx(width, rel=0.25)
    assert share - one["low"][0] == pytest.approx(width, rel=0.25)
    mean = probe_backbone(encoder, task, pooling="mean", seed=3)[1]
    gap = gaps(mean, draws)
    assert gap["low"][0] < 1 - share < gap["high"][0] and gap["low"][0] > 0


def test_nothing_stays_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    encoder = FrozenEncoder(folder(tmp_path / "model"))
    probe_backbone(encoder, toy_task(), pooling="mean", seed=3)
    assert not list((tmp_path / "tmp").iterdir())
