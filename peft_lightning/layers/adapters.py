"""Which adapter, where, how wide: from a setting to layers inside a backbone."""

from __future__ import annotations

from dataclasses import dataclass

from peft_lightning.errors import UsageError

__all__ = ["AdapterConfig"]

KINDS = ("houlsby", "pfeiffer", "parallel", "lora", "mam")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Kind, shape and place of the adapters.

    Attributes:
        kind: houlsby, pfeiffer, parallel, lora or mam (Mix-And-Match: prefixes and parallel adapters).
        bottleneck: r, the inner width; LoRA's rank; in MAM also the number of prefix positions, so that both halves
            have the same number of weights.
        nonlinearity: relu, gelu, gelu_new, tanh, silu, leaky_relu or identity; LoRA has none.
        scaling: factor of the adapter's output; LoRA's alpha / r. None: what the kind's paper uses.
        init_std: standard deviation of the matrices at initialisation (LoRA: of A; B starts from 0).
        target: regular expression over the sites' paths; adapters go where it is found. None: everywhere, and for
            LoRA the projections of query and value.
        name: the adapter's name inside the backbone.

    Raises:
        UsageError: if a value is not allowed.
    """

    kind: str = "houlsby"
    bottleneck: int = 64
    nonlinearity: str = "relu"
    scaling: float | None = None
    init_std: float = 0.02
    target: str | None = None
    name: str = "sparse"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"adapter.kind = {self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.bottleneck < 1:
            raise UsageError(f"adapter.bottleneck = {self.bottleneck}: must be at least 1")
        if not self.init_std >= 0:
            raise UsageError(f"adapter.init_std = {self.init_std}: must be at least 0")
