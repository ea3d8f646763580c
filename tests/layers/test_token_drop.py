"""The engine equals a plain loop over transformers' own layers: states, loss and every gradient, in fp64 to 1e-10."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.masked_lm import hidden_divergence, masked_lm_loss
from peft_lightning.layers.token_drop import TokenDrop, TokenImportance
from tests.reference.token_drop import dropped_pass, full_pass

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
# family -> options; odd and even depths, and an embedding that is narrower than the layers
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 5},
    "roberta": {"num_hidden_layers": 4, "pad_token_id": 0},
    "electra": {"num_hidden_layers": 6, "embedding_size": 8},
}
EXACT: Any = {"rtol": 1e-10, "atol": 1e-11}


def model(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **{**FAMILIES[family], **options})
    return transformers.AutoModelForMaskedLM.from_config(config).double()


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, kept positions, targets (some of them dropped), labels."""
    torch.manual_seed(1)
    keep, targets = (torch.stack([torch.randperm(16)[:n].sort().values for _ in range(3)]) for n in (8, 4))
    return torch.randint(5, 40, (3, 16)), keep, targets, torch.randint(0, 40, (3, 4))


def at(x_BSD: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([row[places] for row, places in zip(x_BSD, positions, strict=True)])


def plain_head(whole: Any, hidden: Tensor) -> Tensor:
    """Logits by transformers' own head."""
    if whole.config.model_type == "bert":
        logits: Tensor = whole.cls(hidden)
    elif whole.config.model_type == "roberta":
        logits = whole.lm_head(hidden)
    else:
        logits = whole.generator_lm_head(whole.generator_predictions(hidden))
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("sparse_last", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_semantic_consistent_step_equals_the_plain_one(
    family: str, share_prefix: bool, sparse_last: bool, checkpointing: bool
) -> None:
    whole = model(family)
    engine = TokenDrop(whole, checkpointing=checkpointing)
    ids, keep, targets, labels = batch()
    run = engine(ids, targets, keep, full=True, share_prefix=share_prefix, sparse_last=sparse_last)
    dropped, kept = dropped_pass(engine.bare, ids, keep)
    full, before = full_pass(engine.bare, ids)
    assert run.student is not None and run.teacher is not None
    assert_close(run.student, at(dropped, targets), **EXACT)
    assert_close(run.teacher, at(full, targets), **EXACT)
    pair = run.compared("kept_hidden", before=True)
    assert_close(pair[1], kept, **EXACT)
    assert_close(pair[0], at(before, keep), **EXACT)

    y = labels.flatten()
    inputs = [engine.transform(x).flatten(0, 1) for x in (run.student, run.teacher)]
    weight, bias = engine.output_layer()
    found = masked_lm_loss(inputs[0], inputs[1], weight, bias, y, factors=(0.5, 0.5, 0.05), chunk=5).loss
    found = found + 0.05 * hidden_divergence(*pair)
    s, t = (plain_head(whole, at(x, targets)).flatten(0, 1) for x in (dropped, full))
    teacher = t.detach().softmax(-1)
    local = at(before, keep).detach().softmax(-1)
    expected = 0.5 * F.cross_entropy(s, y) + 0.5 * F.cross_entropy(t, y)
    expected = expected + 0.05 * (teacher * (teacher.log() - s.log_softmax(-1))).sum(-1).mean()
    expected = expected + 0.05 * (local * (local.log() - kept.log_softmax(-1))).sum(-1).mean()
    assert_close(found, expected, **EXACT)
    compare_gradients(whole, found, expected)


def compare_gradients(whole: Any, found: Tensor, expected: Tensor) -> None:
    parameters = dict(whole.named_parameters())
    got = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
    want = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    used = 0
    for name, one, other in zip(parameters, got, want, strict=True):
        empty = torch.zeros_like(parameters[name])
        one, other = (empty if g is None else g for g in (one, other))
        assert_close(one, other, **EXACT, msg=f"{name}: {one} {other}")
        used += bool(one.any())
    assert used >= len(parameters) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pass_alone(family: str) -> None:
    whole = model(family)
    engine = TokenDrop(whole)
    ids, keep, targets, _ = batch()
    assert_close(engine(ids, targets, keep).student, at(dropped_pass(engine.bare, ids, keep)[0], targets), **EXACT)
    run = engine(ids, targets, None, full=True)
    assert run.student is None and run.teacher is not None
    logits = engine.logits(run.teacher)
    assert_close(logits, at(whole(input_ids=ids).logits, targets), **EXACT)
    expected = whole(input_ids=ids, labels=torch.full_like(ids, -100).scatter(1, targets, batch()[3])).loss
    found = masked_lm_loss(
        engine.transform(run.teacher).flatten(0, 1), None, *engine.output_layer(), batch()[3].flatten()
    ).loss
    assert_close(found, expected, **EXACT)
    compare_gradients(whole, found, expected)


def test_all_tokens_kept_is_the_full_pass() -> None:
    engine = TokenDrop(model("bert"))
    ids, _, targets, _ = batch()
    run = engine(ids, targets, torch.arange(16).expand(3, -1), full=True, share_prefix=False)
    assert_close(run.student, run.teacher, **EXACT)


def test_documents_do_not_see_each_other() -> None:
    """A block of two documents: each one's states are those that it has with the other one's words replaced."""
    engine = TokenDrop(model("bert"))
    ids, _, _, _ = batch()
    documents = (torch.arange(16) >= 9).long().expand(3, -1)
    sight = documents.unsqueeze(2) == documents.unsqueeze(1)
    everywhere, keep = torch.arange(16).expand(3, -1), torch.tensor([0, 1, 4, 5, 9, 10, 11, 15]).expand(3, -1)
    other = ids.clone()
    other[:, 9:] = ids[:, 9:].flip(1)
    first, second = (engine(i, everywhere, keep, full=True, mask_BSS=sight) for i in (ids, other))
    for name in ("student", "teacher"):
        one, two = getattr(first, name), getattr(second, name)
        assert_close(one[:, :9], two[:, :9], **EXACT)
        assert (one[:, 9:] - two[:, 9:]).abs().max() > 1e-3
    seen = engine(ids, everywhere, keep, full=True)
    assert seen.teacher is not None and first.teacher is not None
    assert (seen.teacher - first.teacher).abs().max() > 1e-3


def test_compiles_to_one_graph_a_kind_of_step_and_never_again() -> None:
    engine = TokenDrop(model("bert").float())
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(engine.__call__, dynamic=False, fullgraph=True, backend=counter)
    ids, keep, targets, _ = batch()
    for step in range(6):
        keep = torch.stack([torch.randperm(16)[:8].sort().values for _ in range(3)])
        found = compiled(ids, targets, keep, full=step % 3 == 2)
        expected = engine(ids, targets, keep, full=step % 3 == 2)
        assert_close(found.student, expected.student)
    assert counter.frame_count == 2


def test_a_copy_drives_its_own_model() -> None:
    whole = model("bert")
    engine = TokenDrop(whole)
    twin = copy.deepcopy(engine)
    assert twin.model is not whole


def test_refusals() -> None:
    with pytest.raises(UsageError, match="num_hidden_layers = 3: token dropping needs 4"):
        TokenDrop(model("bert", num_hidden_layers=3))
    other = transformers.AutoModelForMaskedLM.from_config(
        transformers.AutoConfig.for_model("distilbert", dim=16, n_layers=4, n_heads=2, hidden_dim=16, vocab_size=20)
    )
    with pytest.raises(UsageError, match="'distilbert': pretraining knows bert, roberta, electra"):
        TokenDrop(other)


def test_importance_is_a_moving_average_over_the_words_that_were_targets() -> None:
    """Against a loop over words; micro-batches and ranks add up before the average moves."""
    importance = TokenImportance(6, protected=[1], never=[0])
    table = [10.0] * 6
    torch.manual_seed(0)
    for _ in range(3):
        seen: dict[int, list[float]] = {}
        for _ in range(2):
            ids, losses = torch.randint(2, 5, (7,)), torch.rand(7)
            importance.collect(ids, losses)
            for i, loss in zip(ids.tolist(), losses.tolist(), strict=True):
                seen.setdefault(i, []).extend([loss, loss])  # two ranks with the same
        importance.update(0.9, lambda sums: sums * 2)
        for i, values in seen.items():
            table[i] = 0.9 * table[i] + 0.1 * sum(values) / len(values)
        assert not importance.sums.any()
    assert_close(importance.table, torch.tensor(table))
    scores = importance.scores(torch.tensor([[0, 1, 2, 5]]))
    assert scores[0, 0] == -torch.inf and scores[0, 1] == torch.inf and scores[0, 3] == 10.0
    assert importance.scores(torch.tensor([[0, 1, 2, 5]]), random=True).tolist() == [[-torch.inf, torch.inf, 0.0, 0.0]]
    assert set(importance.state_dict()) == {"table", "decided"}
