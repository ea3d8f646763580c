"""Ranks that differ between modules, and whole modules that were trained, in the words of Hugging Face PEFT.

Facts from peft 0.21.2. A key of ``rank_pattern`` or ``alpha_pattern`` means the modules whose path matches
``(.*\\.)?(key)$``, the first key that does (utils/other, get_pattern_key); so the keys written here are whole paths,
with nothing before them. A name in ``modules_to_save`` means every module whose path *ends* so, also in the middle of a
word (_set_trainable), and no LoRA goes inside of one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peft_lightning.errors import CheckpointError

__all__ = ["rank_settings", "whole_modules"]


def rank_settings(ranks: Mapping[str, int], factor: float) -> dict[str, Any]:
    """The settings that give each module its rank and all of them the same factor, alpha / r.

    Args:
        ranks: path of a module -> rank.
        factor: alpha / r.

    Returns:
        ``r`` and ``lora_alpha`` of the most common rank (the lowest, where several are), and patterns for the rest.

    >>> rank_settings({"a.q": 4, "b.q": 8, "c.q": 4}, 0.5)
    {'r': 4, 'lora_alpha': 2, 'rank_pattern': {'^b\\\\.q': 8}, 'alpha_pattern': {'^b\\\\.q': 4}}
    """
    counts = Counter(ranks.values())
    usual = min(counts, key=lambda rank: (-counts[rank], rank))
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": _alpha(factor, usual),
        "rank_pattern": others,
        "alpha_pattern": {pattern: _alpha(factor, rank) for pattern, rank in others.items()},
    }


def whole_modules(paths: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names for ``modules_to_save``.

    Args:
        paths: of the modules that were trained.
        modules: paths of all modules, in the same model.

    Raises:
        CheckpointError: if the names would mean other modules too.
    """
    names = sorted(paths)
    meant = {path for path in modules if path.endswith(tuple(names))}
    if others := sorted(meant - set(names)):
        raise CheckpointError(f"PEFT's format cannot name {', '.join(names[:2])}, ... without {', '.join(others[:2])}")
    return names


def _alpha(factor: float, rank: int) -> int | float:
    alpha = factor * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
