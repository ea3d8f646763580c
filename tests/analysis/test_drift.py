"""The drift against cosines taken one text at a time, and what the sentence encoder is given to read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM

from peft_lightning.analysis.drift import drift_scores, drift_sums
from peft_lightning.analysis.encoder import FrozenEncoder
from peft_lightning.backbones.toy import TOY_VOCABULARY, toy_tokenizer
from peft_lightning.errors import UsageError
from peft_lightning.functional.tokens import select_tokens
from peft_lightning.layers.token_drop import TokenDrop
from tests.reference.token_drop import dropped_pass, full_pass

S, P, K = 16, 3, 8
PAD, CLS, SEP, MASK = (toy_tokenizer().convert_tokens_to_ids(f"[{name}]") for name in ("PAD", "CLS", "SEP", "MASK"))
FIRST = 5  # of the words


def model(seed: int = 0) -> Any:
    """A masked language model of five layers over the toy language."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "bert",
        **{"vocab_size": len(TOY_VOCABULARY), "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2},
        **{"intermediate_size": 32, "max_position_embeddings": S, "initializer_range": 0.3},
    )
    return AutoModelForMaskedLM.from_config(config)


def pretraining(seed: int = 0, drops: bool = True) -> Any:
    """What the drift needs of a pretraining module."""
    return SimpleNamespace(
        engine=TokenDrop(model(seed).eval()),
        choose=lambda ids, noise: select_tokens(ids.float(), K, noise),
        tokenizer=toy_tokenizer(),
        drops=drops,
    )


def blocks(size: int, seed: int = 0, start: int = 0) -> dict[str, Tensor]:
    """Random blocks of words between [CLS] and [SEP]; the first two targets are masked, the third stays."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST, FIRST + 29, (size, S), generator=generator)
    ids[:, 0], ids[:, -1] = CLS, SEP
    targets = torch.stack([1 + torch.randperm(S - 2, generator=generator)[:P].sort().values for _ in range(size)])
    labels = ids.gather(1, targets)
    return {
        "input_ids": ids.scatter(1, targets[:, :2], MASK),
        "targets": targets,
        "labels": labels,
        "noise": torch.rand(size, S, generator=generator),
        "rows": torch.arange(start, start + size),
        "valid": torch.ones(size, dtype=torch.bool),
    }


def originals(batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"].clone()
    for row, targets, labels in zip(ids, batch["targets"], batch["labels"], strict=True):
        row[targets] = labels
    return ids


class Reader:
    """Stands for a sentence encoder: remembers what it read; a text's vector counts its words."""

    def __init__(self, mask: str | None = "<mask>") -> None:
        self.tokenizer, self.texts = SimpleNamespace(mask_token=mask), list[str]()
        self.words = [*TOY_VOCABULARY, "<mask>"]

    def encode(self, texts: list[str]) -> Tensor:
        self.texts = texts
        return torch.tensor([[text.split().count(word) for word in self.words] for text in texts]).float()


def test_the_models_own_measure_one_text_at_a_time() -> None:
    module, batch = pretraining(), blocks(4)
    scores = drift_scores(drift_sums(module, batch))
    bare = module.engine.bare
    own: dict[str, list[Tensor]] = {"full": [], "dropped": [], "original": []}
    with torch.no_grad():
        for number, ids in enumerate(batch["input_ids"]):
            keep = module.choose(ids[None], batch["noise"][number, None])
            own["original"].append(full_pass(bare, originals(batch)[number, None])[0][0].mean(0))
            own["full"].append(full_pass(bare, ids[None])[0][0].mean(0))
            own["dropped"].append(dropped_pass(bare, ids[None], keep)[0][0].mean(0))
    for name in ("full", "dropped"):
        cosines = [F.cosine_similarity(a, b, dim=0) for a, b in zip(own[name], own["original"], strict=True)]
        assert scores[f"own_{name}"] == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    pairs = [F.cosine_similarity(own["original"][i], own["original"][j], dim=0) for i in range(4) for j in range(i)]
    assert scores["own_unrelated"] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)
    assert scores.keys() == {"own_full", "own_dropped", "own_unrelated"}
    assert scores["own_dropped"] < scores["own_full"] < 1


def test_nothing_lost_is_one() -> None:
    module, batch = pretraining(), blocks(3)
    whole = {**batch, "input_ids": originals(batch)}
    module.choose = lambda ids, noise: torch.arange(S).expand(len(ids), -1)
    scores = drift_scores(drift_sums(module, whole))
    assert scores["own_full"] == pytest.approx(1, abs=1e-6)
    assert scores["own_dropped"] == pytest.approx(1, abs=1e-6)  # all are kept
    assert scores["own_unrelated"] < 0.99


def test_what_the_encoder_reads() -> None:
    module, batch, reader = pretraining(), blocks(2), Reader()
    scores = drift_scores(drift_sums(module, batch, reader))  # type: ignore[arg-type]
    original, masked, full, dropped, kept = (reader.texts[start : start + 2] for start in range(0, 10, 2))
    words = toy_tokenizer().convert_ids_to_tokens
    assert original == [" ".join(words(ids[1:-1].tolist())) for ids in originals(batch)]
    keep = module.choose(batch["input_ids"], batch["noise"])
    engine = module.engine
    with torch.no_grad():
        passes = engine(batch["input_ids"], batch["targets"], keep, full=True)
    for texts, hidden in ((full, passes.teacher), (dropped, passes.student)):
        logits = engine.logits(hidden)
        logits[..., :FIRST] = -torch.inf  # special tokens are no answers
        for text, before, targets, answers in zip(texts, original, batch["targets"], logits.argmax(-1), strict=True):
            expected = before.split()
            for place, answer in zip(targets.tolist(), answers.tolist(), strict=True):
                expected[place - 1] = words(answer)
            assert text == " ".join(expected)
    for number, text in enumerate(masked):
        assert [word == "<mask>" for word in text.split()] == (batch["input_ids"][number, 1:-1] == MASK).tolist()
    for number, text in enumerate(kept):
        stay = [i for i in batch["input_ids"][number, keep[number]].tolist() if i not in (CLS, SEP)]
        assert text == " ".join("<mask>" if i == MASK else words(i) for i in stay)
    counts = Reader().encode(reader.texts).split(2)
    for name, column in zip(("masked", "full", "dropped", "kept"), counts[1:], strict=True):
        assert scores[f"text_{name}"] == pytest.approx(float(F.cosine_similarity(column, counts[0]).mean()), abs=1e-6)


def test_right_answers_are_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = pretraining(), blocks(3)
    right = F.one_hot(batch["labels"], len(TOY_VOCABULARY)).float()
    monkeypatch.setattr(module.engine, "logits", lambda hidden: right)
    scores = drift_scores(drift_sums(module, batch, Reader(mask=None)))  # type: ignore[arg-type]
    assert scores["text_full"] == pytest.approx(1, abs=1e-6) == scores["text_dropped"]
    assert scores["text_kept"] < scores["text_masked"] < 0.999


def test_sums_add_up_and_rows_that_do_not_count_stay_out() -> None:
    module, batch = pretraining(), blocks(6)
    whole = drift_sums(module, batch)
    parts = [
        drift_sums(module, {name: values[part] for name, values in batch.items()}) for part in ([0, 1], [2, 3, 4, 5])
    ]
    for name, total in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], total, atol=1e-5, rtol=1e-5)
    batch["valid"][4:] = False
    batch["input_ids"][4:] = MASK
    four = drift_sums(module, batch)
    assert four["count"] == 4
    torch.testing.assert_close(four["own_full"], drift_sums(module, {k: v[:4] for k, v in batch.items()})["own_full"])
    with pytest.raises(UsageError, match="rows = 1: the drift needs at least 2 blocks"):
        drift_scores(drift_sums(module, {name: values[:1] for name, values in batch.items()}))


def test_documents_do_not_see_each_other() -> None:
    module, batch = pretraining(), blocks(3)
    batch["documents"] = (torch.arange(S) >= S // 2).long().expand(3, -1)
    masks: list[Tensor] = []
    engine = module.engine

    def spy(*args: Any, mask_BSS: Tensor, **options: Any) -> Any:
        masks.append(mask_BSS)
        return engine(*args, mask_BSS=mask_BSS, **options)

    module.engine = spy
    apart = drift_scores(drift_sums(module, batch))
    assert len(masks) == 2
    for mask in masks:
        assert mask.shape == (3, S, S) and mask[0, 0].tolist() == [True] * (S // 2) + [False] * (S // 2)
    assert apart["own_full"] != drift_scores(drift_sums(pretraining(), blocks(3)))["own_full"]


def test_without_dropping_there_is_one_pass() -> None:
    scores = drift_scores(drift_sums(pretraining(drops=False), blocks(3), Reader()))  # type: ignore[arg-type]
    assert scores.keys() == {"own_full", "own_unrelated", "text_full", "text_masked", "text_unrelated"}


def test_an_encoder_needs_words() -> None:
    module = pretraining()
    module.tokenizer = None
    assert "own_full" in drift_sums(module, blocks(2))
    with pytest.raises(UsageError, match="needs a tokenizer that turns ids into text"):
        drift_sums(module, blocks(2), Reader())  # type: ignore[arg-type]


@pytest.mark.real_data
def test_a_real_sentence_encoder(encoder: str) -> None:
    scores = drift_scores(drift_sums(pretraining(), blocks(8), FrozenEncoder(encoder)))
    for name in ("full", "dropped", "masked", "kept"):
        assert scores["text_unrelated"] < scores[f"text_{name}"] < 1
