"""What SCTD (Zhong et al., 2023) drops and compares: settings, and presets of them.

The paper does not say what its distributions p(X) are. Ours (preset ``sctd``): the words at the masked positions
after the last layer, and the width of the kept tokens' states before it. Preset ``sctd-paper`` reads X literally:
the width of every token's state at both places, both passes computed in full.

Preset ``sctd-released``: the released code compares [CLS] only, computes L on the dropping pass, so that the KL alone
trains its full pass, and divides the KL's sum over blocks by the number of targets, as the cross-entropy's, which
leaves some 1/80 of lambda; its moving average has beta 0.95. Its step 0 is semantic-consistent, ours is not; its KL
sends gradients into the teacher, ours none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_lightning.checks import check_choices, check_types
from peft_lightning.errors import UsageError
from peft_lightning.functional.tokens import kept_length

__all__ = ["PRESETS", "DropConfig"]

_COMMON: dict[str, Any] = {
    "interval_passes": "both",  # on every interval-th step
    "interval": 10,
    "keep": 0.5,
    "weight": 0.05,
    "selection": "loss",
    "full_loss": "teacher",
    "global_kl": "none",
    "local_kl": "none",
    "share_prefix": True,
    "detach": True,
    "beta": 0.995,
}
PRESETS: dict[str, dict[str, Any]] = {
    "mlm": {"interval_passes": "full", "interval": 1},
    "token-drop": {"interval_passes": "dropping", "interval": 1},
    "drop+full": {"interval_passes": "full"},
    "sctd": {"global_kl": "masked_logits", "local_kl": "kept_hidden"},
    "sctd-paper": {"global_kl": "all_hidden", "local_kl": "all_hidden", "share_prefix": False},
    "sctd-released": {
        **{"global_kl": "cls_hidden", "local_kl": "cls_hidden", "full_loss": "student"},
        **{"share_prefix": False, "detach": False, "beta": 0.95},
    },
}


_COMPARING = ("weight", "full_loss", "global_kl", "local_kl", "share_prefix", "detach")
# what means nothing to a preset
_IDLE = {
    "mlm": ("keep", "interval", "selection", "beta", *_COMPARING),
    "token-drop": ("interval", *_COMPARING),
    "drop+full": _COMPARING,
}


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """What is dropped, and what a semantic-consistent step compares.

    Attributes:
        preset: mlm (nothing dropped), token-drop (Hou et al., 2022), drop+full (every interval-th step is a full one),
            sctd, sctd-paper, or sctd-released. It decides the settings below that are null.
        keep: share of the tokens that stay in the middle layers.
        interval: Fi, optimizer steps from one semantic-consistent step to the next.
        weight: lambda, the factor of the KL terms.
        full_loss: whose loss L is: teacher, student (the released code's), or none.
        global_kl: compared after the last layer: masked_logits, all_hidden, cls_hidden or none.
        local_kl: compared before the last layer: kept_hidden, all_hidden, cls_hidden or none.
        share_prefix: whether both passes share what they have in common. Exact without dropout; with it, both passes
            have the same draws below the first layer that drops tokens, and the KL lacks the difference of two draws.
        sparse_last: whether the last layer computes only what is predicted or compared.
        detach: whether the KL sends no gradient into the teacher.
        selection: which tokens stay: loss (importance), or random.
        beta: of the importance's moving average.

    Raises:
        UsageError: if a value is not allowed, or means nothing to the preset.
    """

    preset: str = "sctd"
    keep: float | None = None
    interval: int | None = None
    weight: float | None = None
    full_loss: str | None = None
    global_kl: str | None = None
    local_kl: str | None = None
    share_prefix: bool | None = None
    sparse_last: bool = True
    detach: bool | None = None
    selection: str | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "drop")
        hidden = ("all_hidden", "cls_hidden", "none")
        check_choices(
            self,
            "drop",
            preset=tuple(PRESETS),
            full_loss=("teacher", "student", "none"),
            global_kl=("masked_logits", *hidden),
            local_kl=("kept_hidden", *hidden),
            selection=("loss", "random"),
        )
        kept_length(8, self.of("keep"))
        if self.interval is not None and self.interval < 1:
            raise UsageError(f"drop.interval = {self.interval}: must be at least 1")
        if self.weight is not None and self.weight < 0:
            raise UsageError(f"drop.weight = {self.weight}: must be at least 0")
        if self.beta is not None and not 0 <= self.beta < 1:
            raise UsageError(f"drop.beta = {self.beta}: must lie in [0, 1)")
        for name in _IDLE.get(self.preset, ()):
            if getattr(self, name) is not None:
                raise UsageError(f"drop.{name} = {getattr(self, name)!r}: means nothing to preset {self.preset!r}")

    def of(self, name: str) -> Any:
        """A setting in force: given here, or else the preset's."""
        given = getattr(self, name, None)
        return given if given is not None else {**_COMMON, **PRESETS[self.preset]}[name]

    @property
    def teacher_learns(self) -> bool:
        """Whether a semantic-consistent step sends gradients into the full pass."""
        return self.of("full_loss") == "teacher" or not self.of("detach")

    def passes(self, step: int) -> str:
        """Which passes optimizer step ``step`` (from 1) has: dropping, full or both."""
        return str(self.of("interval_passes")) if step % self.of("interval") == 0 else "dropping"
