"""Gradients and Hessian products against finite differences, over uneven batches, ranks and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.gradients import hessian_gradient, mean_gradients
from tests.reference.masks import finite_difference, finite_difference_flow

Batch = tuple[Tensor, Tensor]
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
# batches of unequal size: means of means would be wrong
SIZES = (3, 1, 4)


class _Attentive(nn.Module):
    """Attention by the fused function, a bottleneck, a head: small, and linear in nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x_BLH: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x_BLH).chunk(3, dim=-1))
        h_BLH = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h_BLH = self.norm(h_BLH + self.up(torch.tanh(self.down(h_BLH))))
        return self.head(h_BLH[:, 0])


@pytest.fixture
def model() -> _Attentive:
    torch.manual_seed(0)
    return _Attentive().double().requires_grad_(False)


@pytest.fixture
def batches() -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(n, 5, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in SIZES]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    names = ("qkv.weight", "down.weight", "up.weight")
    return {name: model.get_parameter(name).requires_grad_() for name in names}


def _loss_of(model: nn.Module) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def batch_loss(batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = batch
        return F.cross_entropy(model(x), y, CLASS_WEIGHTS, reduction="sum"), CLASS_WEIGHTS[y].sum()

    return batch_loss


def _mean_loss(model: nn.Module, batches: list[Batch]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The loss over all examples at once, as a function of the weights."""
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return lambda weights: F.cross_entropy(functional_call(model, dict(weights), (x,)), y, CLASS_WEIGHTS)


def _same(value: Tensor) -> Tensor:
    return value


def test_gradient_of_the_mean_over_uneven_batches(model: _Attentive, batches: list[Batch]) -> None:
    weights = _weights(model)
    result = mean_gradients(_loss_of(model), weights, iter(batches), _same)
    with torch.no_grad():
        expected = finite_difference(_mean_loss(model, batches), {n: w.detach() for n, w in weights.items()})
    assert_close(result, expected, rtol=1e-6, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hessian_times_gradient_of_the_mean_over_uneven_batches(model: _Attentive, batches: list[Batch]) -> None:
    weights = _weights(model)
    result = hessian_gradient(_loss_of(model), weights, batches, _same)
    with torch.no_grad():
        expected = finite_difference_flow(_mean_loss(model, batches), {n: w.detach() for n, w in weights.items()})
    assert_close(result, expected, rtol=1e-4, atol=1e-7)
    assert max(value.abs().max() for value in expected.values()) > 1e-2  # far above the tolerance
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("function", [mean_gradients, hessian_gradient])
def test_batching_and_ranks_change_nothing(
    model: _Attentive, batches: list[Batch], function: Callable[..., dict[str, Tensor]]
) -> None:
    """One rank with all examples in one batch equals three ranks, whose sums are exchanged in the order of calls."""
    weights, loss = _weights(model), _loss_of(model)
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    alone = function(loss, weights, [whole], _same)
    assert_close(function(loss, weights, batches, _same), alone)
    shares = [batches[:1], batches[1:], []]
    results = _on_ranks(lambda share, reduce: function(loss, weights, share, reduce), shares)
    for result in results:
        assert_close(result, alone)


def _on_ranks(
    run: Callable[[list[Batch], Callable[[Tensor], Tensor]], dict[str, Tensor]], shares: list[list[Batch]]
) -> list[dict[str, Tensor]]:
    """Run every rank in a thread; their sums meet at a barrier.

    Which attention runs is a setting of the process: held here, since threads would take it from each other.
    """
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    from torch.nn.attention import SDPBackend, sdpa_kernel

    barrier, table = Barrier(len(shares)), [torch.zeros(())] * len(shares)

    def rank(number: int) -> dict[str, Tensor]:
        def reduce(value: Tensor) -> Tensor:
            table[number] = value
            barrier.wait()
            total = torch.stack(table).sum(0)
            barrier.wait()
            return total

        return run(shares[number], reduce)

    with sdpa_kernel(SDPBackend.MATH), ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(rank, range(len(shares))))


@pytest.mark.parametrize("function", [mean_gradients, hessian_gradient])
def test_half_precision_weights_give_fp32_sums(
    model: _Attentive, batches: list[Batch], function: Callable[..., dict[str, Tensor]]
) -> None:
    model.to(torch.bfloat16)
    weights = _weights(model)

    def loss(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch[0].to(torch.bfloat16)).float()
        return F.cross_entropy(logits, batch[1], reduction="sum"), torch.tensor(float(len(batch[1])))

    half = function(loss, weights, batches, _same)
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert all(value.abs().sum() > 0 for value in half.values())


def test_a_tensor_without_influence_gets_zeros(model: _Attentive, batches: list[Batch]) -> None:
    weights = _weights(model) | {"unused": torch.ones(2, 2, dtype=torch.float64, requires_grad=True)}
    for function in (mean_gradients, hessian_gradient):
        result = function(_loss_of(model), weights, batches, _same)
        assert_close(result["unused"], torch.zeros(2, 2, dtype=torch.float64))
        assert result["up.weight"].abs().sum() > 0


def test_a_linear_loss_has_no_second_derivative() -> None:
    weight = torch.ones(3, requires_grad=True)

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        return (batch * weight).sum(), torch.ones(())

    assert_close(mean_gradients(loss, {"w": weight}, [torch.arange(3.0)], _same)["w"], torch.arange(3.0))
    assert_close(hessian_gradient(loss, {"w": weight}, [torch.arange(3.0)], _same)["w"], torch.zeros(3))


@pytest.mark.parametrize("function", [mean_gradients, hessian_gradient])
def test_no_batches(model: _Attentive, function: Callable[..., dict[str, Tensor]]) -> None:
    with pytest.raises(UsageError, match=r"weigh 0 together: there must be training data.*random, magnitude, er"):
        function(_loss_of(model), _weights(model), [], _same)


@pytest.mark.parametrize("function", [mean_gradients, hessian_gradient])
def test_no_weights(batches: list[Batch], model: _Attentive, function: Callable[..., dict[str, Tensor]]) -> None:
    with pytest.raises(UsageError, match="no tensor to take a gradient of"):
        function(_loss_of(model), {}, batches, _same)


def test_the_last_batch_is_run_once(model: _Attentive, batches: list[Batch]) -> None:
    sizes, loss = [], _loss_of(model)

    def counted(batch: Batch) -> tuple[Tensor, Tensor]:
        sizes.append(len(batch[1]))
        return loss(batch)

    hessian_gradient(counted, _weights(model), batches, _same)
    assert sizes == [3, 1, 4, 1, 3]
