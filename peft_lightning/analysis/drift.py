"""How far corrupted text drifts from the original in meaning (SCTD, section 2.2 and figure 3).

The paper takes the cosine between sentence vectors of a corrupted and of the original text, in the course of
pretraining, and leaves open what the corrupted text of a run is and how tokens that were dropped inside the model
come into it. We read it in two ways. A block of the corpus is the sentence.

**By the model itself** (``own_...``): a text's vector is the mean of the last layer over all its tokens. The
original goes through the full pass. Compared with it are the corrupted text through the full pass (``own_full``:
what masking does) and through the dropping pass (``own_dropped``: what dropping adds). The last layer gives all
tokens here, dropped ones too: they re-enter before it.

**By a sentence encoder from outside** (``text_...``), which stays what it is while the model changes: a vector is
the mean of the encoder's last layer over a text's tokens. Compared with the original text are

- ``text_full`` and ``text_dropped``: the text with the model's own predictions in place of the targets, of either
  pass. These move in training, and the gap between them is what dropping costs in meaning;
- ``text_masked``: the corrupted text as the model sees it, mask signs included;
- ``text_kept``: its kept tokens alone, in their order.

Cosines of mean vectors are high for any two texts of some models. ``own_unrelated`` and ``text_unrelated``, the
mean cosine between originals of different blocks, say how high: nothing was lost at 1, everything there.

Shapes: B blocks, S tokens of a block, P targets, K kept, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_lightning.analysis.encoder import FrozenEncoder
from peft_lightning.errors import UsageError

__all__ = ["drift_scores", "drift_sums"]


def drift_sums(module: Any, batch: Mapping[str, Tensor], encoder: FrozenEncoder | None = None) -> dict[str, Tensor]:
    """What a batch adds to the measures; sums over blocks, which may be added up over batches and ranks.

    Args:
        module: a pretraining module with ``engine``, ``choose``, ``drops`` and ``tokenizer``, in evaluation mode.
        batch: of its data module, on its device; rows that are not ``valid`` do not count.
        encoder: for the measures from outside.

    Raises:
        UsageError: if there is an encoder and the module has no tokenizer to write text with.

    Returns:
        fp32: ``count`` [1], for each measure the sum of its cosines [1], and for ``own`` and ``text`` the sum of the
        originals' unit vectors [D].
    """
    if encoder is not None and module.tokenizer is None:
        raise UsageError("encoder: needs a tokenizer that turns ids into text; the module has none")
    valid = batch["valid"].bool()
    rows: dict[str, Tensor] = {name: values[valid] for name, values in batch.items() if len(values) == len(valid)}
    with torch.no_grad():
        own, hidden, keep_BK = _own(module, rows)
        vectors = {"own": own}
        if encoder is not None:
            ids = {name: _answers(module, states, rows["targets"]) for name, states in hidden.items()}
            vectors["text"] = _from_outside(module.tokenizer, encoder, rows, ids, keep_BK)
    device = batch["input_ids"].device
    sums = {"count": valid.sum().reshape(1).float()}
    for kind, found in vectors.items():
        original_ND = F.normalize(found.pop("original").float(), dim=1)
        sums[f"{kind}_vector"] = original_ND.sum(dim=0).to(device)
        for name, vectors_ND in found.items():
            cosines_N = (F.normalize(vectors_ND.float(), dim=1) * original_ND).sum(dim=1)
            sums[f"{kind}_{name}"] = cosines_N.sum().reshape(1).to(device)
    return sums


def drift_scores(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The measures, from sums over at least two blocks.

    Raises:
        UsageError: if there are fewer.
    """
    count = float(sums["count"])
    if count < 2:
        raise UsageError(f"rows = {count:.0f}: the drift needs at least 2 blocks of the validation split")
    scores = {}
    for name, total in sums.items():
        if name.endswith("_vector"):  # the square of the sum holds every pair twice and every block with itself
            square = float(total.double().square().sum())
            scores[name.replace("_vector", "_unrelated")] = (square - count) / (count * (count - 1))
        elif name != "count":
            scores[name] = float(total) / count
    return scores


def _own(module: Any, rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """The model's own vectors [B, D] of each variant, the last layer [B, S, D] of each pass, and what is kept."""
    ids_BS = rows["input_ids"]
    mask_BSS = None
    if "documents" in rows:
        mask_BSS = rows["documents"].unsqueeze(2) == rows["documents"].unsqueeze(1)
    keep_BK = module.choose(ids_BS, rows["noise"]) if module.drops else None
    all_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)

    def run(ids: Tensor, keep: Tensor | None) -> Any:
        return module.engine(ids, all_BS, keep, full=True, sparse_last=False, mask_BSS=mask_BSS)

    passes, original = run(ids_BS, keep_BK), run(_filled(rows, rows["labels"]), None).teacher
    hidden = {"full": passes.teacher} | ({} if keep_BK is None else {"dropped": passes.student})
    vectors = {name: states.float().mean(dim=1) for name, states in {"original": original, **hidden}.items()}
    return vectors, hidden, keep_BK


def _filled(rows: Mapping[str, Tensor], answers_BP: Tensor) -> Tensor:
    """The blocks with these words at the targets."""
    return rows["input_ids"].scatter(1, rows["targets"], answers_BP)


def _answers(module: Any, hidden_BSD: Tensor, targets_BP: Tensor) -> Tensor:
    """The likeliest words at the targets, [B, P]; special tokens are no words."""
    hidden_BPD = hidden_BSD.gather(1, targets_BP.unsqueeze(-1).expand(-1, -1, hidden_BSD.shape[-1]))
    logits_BPV = module.engine.logits(hidden_BPD)[..., : len(module.tokenizer)]
    specials = torch.tensor(sorted(set(module.tokenizer.all_special_ids)), device=targets_BP.device)
    return logits_BPV.index_fill(-1, specials, -torch.inf).argmax(dim=-1)


def _from_outside(
    tokenizer: Any,
    encoder: FrozenEncoder,
    rows: Mapping[str, Tensor],
    answers: Mapping[str, Tensor],
    keep_BK: Tensor | None,
) -> dict[str, Tensor]:
    """The encoder's vectors [B, D] of the original and of each variant, as text."""
    variants = {"original": _filled(rows, rows["labels"]), "masked": rows["input_ids"]}
    variants |= {name: _filled(rows, ids_BP) for name, ids_BP in answers.items()}
    if keep_BK is not None:
        variants["kept"] = rows["input_ids"].gather(1, keep_BK)
    write = _writer(tokenizer, encoder.tokenizer.mask_token or "")
    vectors_ND = encoder.encode([text for ids in variants.values() for text in write(ids)])
    return dict(zip(variants, vectors_ND.split(len(rows["labels"])), strict=True))


def _writer(tokenizer: Any, mask: str) -> Callable[[Tensor], Sequence[str]]:
    """Ids -> texts, without special tokens but for the mask, which is written the encoder's way."""
    hidden = set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}

    def write(ids_BS: Tensor) -> list[str]:
        lists = [[number for number in row if number not in hidden] for row in ids_BS.tolist()]
        texts = [tokenizer.decode(row, skip_special_tokens=False) for row in lists]
        return [cast(str, text).replace(tokenizer.mask_token, mask) for text in texts]

    return write
