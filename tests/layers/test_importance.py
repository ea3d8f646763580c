"""Per-example gates in one backward pass are a loop over single examples through gates that multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.layers.importance import Importance, measure_importance
from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites
from tests.layers.test_pruned_heads import EACH, backbone
from tests.reference.importance import slow_importance


def batches() -> list[dict[str, Any]]:
    """Two batches of different sizes and lengths, with padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for rows, length in ((3, 7), (2, 5)):
        ids = torch.randint(5, 30, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -2:], ids[1, -2:] = 0, 0
        labels = torch.randint(0, 2, (rows,), generator=generator)
        found.append({"inputs": {"input_ids": ids, "attention_mask": mask}, "labels": labels})
    return found


def losses(model: Any) -> Any:
    torch.manual_seed(3)
    head = nn.Linear(16, 2).double()
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def batch_loss(batch: Any) -> tuple[Tensor, Tensor]:
        hidden = model(**batch["inputs"]).last_hidden_state
        last = batch["inputs"]["attention_mask"].sum(1) - 1
        logits = head(hidden[torch.arange(len(last)), last])
        return nn.functional.cross_entropy(logits, batch["labels"], weights, reduction="sum"), weights.sum()

    return batch_loss


def measured(model: Any, some: list[dict[str, Any]], **options: Any) -> Importance:
    return measure_importance(model, losses(model), some, reduce=lambda tensor: tensor, **options)


@EACH
def test_it_is_the_loop_over_examples(family: str, changes: dict[str, Any]) -> None:
    model = backbone(family, changes).double()
    model.requires_grad_(False)
    heads, neurons = attention_sites(model), feed_forward_sites(model)
    places = {path: (site.linears()["output"], site.units) for path, site in heads.items()}
    inner = {path: (site.outer, site.units) for path, site in neurons.items()}
    loss = losses(model)
    expected = slow_importance(model, lambda one: loss(one)[0], batches(), {**places, **inner})
    got = measured(model, batches(), neurons=True)
    assert got.heads.keys() == heads.keys() and got.neurons.keys() == neurons.keys() and not got.blocks
    for path, score in {**got.heads, **got.neurons}.items():
        assert_close(score, expected[path], rtol=1e-6, atol=1e-12)
    assert (got.examples, got.tokens) == (5, 3 * 7 + 2 * 5 - 4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_block_is_one_gate_on_all_that_it_adds() -> None:
    """Finite differences of each example's loss, attention and feed-forward block of a layer scaled together."""
    model = backbone("bert", {"num_attention_heads": 4}).double()
    loss = losses(model)
    got = measured(model, batches(), blocks=True)
    assert not got.neurons and list(got.blocks) == ["encoder.layer.0", "encoder.layer.1"]
    tokens, step = got.tokens, 1e-5
    for path in got.blocks:
        layer = model.get_submodule(path)
        total = 0.0
        for batch in batches():
            for row in range(len(batch["labels"])):
                one = {
                    "inputs": {k: v[row : row + 1] for k, v in batch["inputs"].items()},
                    "labels": batch["labels"][row : row + 1],
                }
                values = []
                for sign in (1, -1):
                    with scaled(layer, 1 + sign * step), torch.no_grad():
                        values.append(float(loss(one)[0]))
                total += abs(values[0] - values[1]) / (2 * step)
        assert got.blocks[path] == pytest.approx(total / tokens, rel=1e-5)


class scaled:
    """What enters the two output maps of a layer, multiplied."""

    def __init__(self, layer: Any, factor: float) -> None:
        self.linears, self.factor = (layer.attention.output.dense, layer.output.dense), factor

    def __enter__(self) -> None:
        for linear in self.linears:
            linear.weight.data.mul_(self.factor)

    def __exit__(self, *args: object) -> None:
        for linear in self.linears:
            linear.weight.data.div_(self.factor)


def test_ranks_are_summed_once() -> None:
    """Two ranks with a batch each know what one process with both knows; all goes in one message."""
    model = backbone("bert", {"num_attention_heads": 4}).double()
    whole = measured(model, batches(), neurons=True, blocks=True)
    messages: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        messages.append(tensor.clone())
        return tensor

    measure_importance(model, losses(model), batches()[:1], reduce=send, neurons=True, blocks=True)
    assert len(messages) == 1
    second = measure_importance(
        model, losses(model), batches()[1:], reduce=lambda t: t + messages[0], neurons=True, blocks=True
    )
    assert (second.examples, second.tokens) == (whole.examples, whole.tokens)
    assert second.blocks == pytest.approx(whole.blocks)
    for kind in ("heads", "neurons"):
        assert_close(getattr(second, kind), getattr(whole, kind))


def test_no_hook_stays_and_no_data_is_an_error() -> None:
    model = backbone("bert", {"num_attention_heads": 4}).double()
    with pytest.raises(UsageError, match="there is no example to measure on"):
        measured(model, [])
    measured(model, batches())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_example_of_several_sequences_is_one() -> None:
    """|dL/dgate| of a row adds its sequences' slopes before the absolute value: a choice is one example."""
    model = backbone("bert", {"num_attention_heads": 4}).double()
    torch.manual_seed(3)
    head = nn.Linear(16, 1).double()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30, (5, 6), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "sequences": torch.tensor([2, 3])}
    batch: dict[str, Any] = {"inputs": inputs, "labels": torch.tensor([1, 0])}

    def loss(one: Any) -> tuple[Tensor, Tensor]:
        known = {name: one["inputs"][name] for name in ("input_ids", "attention_mask")}
        scores_N = head(model(**known).last_hidden_state[:, 0])[:, 0]
        rows = scores_N.split(one["inputs"]["sequences"].tolist())
        parts = [nn.functional.cross_entropy(row, label) for row, label in zip(rows, one["labels"], strict=True)]
        return torch.stack(parts).sum(), torch.tensor(1.0)

    def found(some: list[Any]) -> Importance:
        return measure_importance(model, loss, some, reduce=lambda tensor: tensor)

    def part(rows: slice, sequences: slice) -> dict[str, Any]:
        cut = {name: inputs[name][rows if name == "sequences" else sequences] for name in inputs}
        return {"inputs": cut, "labels": batch["labels"][rows]}

    together = found([batch])
    singles = [found([part(slice(0, 1), slice(0, 2))]), found([part(slice(1, 2), slice(2, 5))])]
    assert (together.examples, together.tokens) == (2, 30)
    for path, scores in together.heads.items():
        assert_close(scores, sum(one.heads[path] * one.tokens for one in singles) / 30)
