"""The settings of Prune-LoRA (sections 3.1 to 3.3 and 4.1.2): what is measured, what goes, which ranks are given."""

from __future__ import annotations

from dataclasses import dataclass

from peft_lightning.checks import check_choices, check_types
from peft_lightning.errors import UsageError
from peft_lightning.functional.heads import NORMS

__all__ = ["BLOCK_SCORES", "ImportanceConfig", "RankConfig", "StructureConfig"]

BLOCK_SCORES = ("normalised", "raw", "gate")
_HEADS = 44 / 144


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """How the importance of heads, neurons and blocks is measured.

    Attributes:
        batches: batches of training data, of each rank, in a pass of their own.
        norm: layer (L2 norm over the heads of each layer) or all (over all heads; their order stays as measured).
        blocks: a block's importance: normalised (the mean of its heads' final importance), raw (the sum of its heads'
            before it is normalised), or gate (of one gate on all that the block adds).
        classifier_steps: steps of Adam on the head alone before measuring, at the optimiser's rate: slopes are those of
            the loss under this head. Training starts from the initial values in any case.
        file: a file that ``peft-lightning importance`` wrote for the same backbone (with --neurons or --blocks gate
            where these are needed), or its folder, which has one for each task; nothing is measured then. It holds
            what was measured, so ``norm`` and ``blocks`` are those set here. None (``null``): it is measured here.

    Raises:
        UsageError: if a value is not allowed.
    """

    batches: int = 10
    norm: str = "layer"
    blocks: str = "normalised"
    classifier_steps: int = 0
    file: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "importance")
        if self.file in ("null", "None"):  # the command line makes a word of null
            object.__setattr__(self, "file", None)
        if self.file is not None and not self.file.strip():
            raise UsageError(
                f"importance.file = {self.file!r}: must be a file of peft-lightning importance, its folder, or null"
            )
        check_choices(self, "importance", norm=NORMS, blocks=BLOCK_SCORES)
        if self.batches < 1:
            raise UsageError(f"importance.batches = {self.batches}: must be at least 1")
        if self.classifier_steps < 0:
            raise UsageError(f"importance.classifier_steps = {self.classifier_steps}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """What is removed before training.

    Attributes:
        heads_to_prune: heads (groups of heads that share keys) that go, as a count or a share in [0, 1). None: the
            paper's 44 of 144 as a share, or what the target asks for.
        min_heads_per_layer: heads that each attention keeps at least.
        ffn_to_prune: neurons of the feed-forward blocks that go, as a count or a share. None: none, or what the target
            asks for.
        min_neurons_per_layer: neurons that each feed-forward block keeps at least.
        target: what is to be left of the backbone at most, ``{params: 0.8}`` or ``{flops: 0.8}``; the same share of
            heads and of neurons goes, so that it is missed by up to what one head costs. A kind whose number is set to
            0 stays whole.
        target_tokens: length of the text that flops are counted for.
        order: importance (the least important go), or random (the baseline; ranks still follow the importance).

    Raises:
        UsageError: if a value is not allowed.
    """

    heads_to_prune: int | float | None = None
    min_heads_per_layer: int = 1
    ffn_to_prune: int | float | None = None
    min_neurons_per_layer: int = 1
    target: dict[str, float] | None = None
    target_tokens: int = 128
    order: str = "importance"

    def __post_init__(self) -> None:
        check_types(self, "prune")
        check_choices(self, "prune", order=("importance", "random"))
        for name, least in (("min_heads_per_layer", 0), ("min_neurons_per_layer", 0), ("target_tokens", 1)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"prune.{name} = {value}: must be at least {least}")
        for name in ("heads_to_prune", "ffn_to_prune"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 if isinstance(value, int) else 0 <= value < 1):
                raise UsageError(f"prune.{name} = {value}: must be a count of at least 0, or a share in [0, 1)")
            if value and self.target:
                raise UsageError(f"prune.{name} = {value}: follows from prune.target = {self.target}; leave it out")
        if self.target is not None:
            self._check_target(self.target)

    def _check_target(self, target: dict[str, float]) -> None:
        fits = len(target) == 1 and all(
            name in ("params", "flops") and type(share) in (int, float) and 0 < share <= 1
            for name, share in target.items()
        )
        if not fits:
            raise UsageError(f"prune.target = {target}: must be {{params: share}} or {{flops: share}}, share in (0, 1]")
        if self.heads_to_prune == 0 == self.ffn_to_prune:
            raise UsageError(f"prune.target = {target}: heads_to_prune and ffn_to_prune are 0, so nothing may go")

    @property
    def heads(self) -> int | float:
        """The number of heads in force without a target."""
        return _HEADS if self.heads_to_prune is None else self.heads_to_prune

    @property
    def neurons(self) -> int | float:
        """The number of neurons in force without a target."""
        return self.ffn_to_prune or 0

    @property
    def takes_neurons(self) -> bool:
        """Whether neurons may go."""
        return bool(self.ffn_to_prune) or (self.target is not None and self.ffn_to_prune is None)

    @property
    def takes_heads(self) -> bool:
        """Whether heads may go."""
        return bool(self.heads) if self.target is None else self.heads_to_prune is None


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """LoRA on query, key, value and output of every attention, its rank by the block's importance.

    Attributes:
        rank: r in the less important blocks.
        high_rank: r in the most important ones; equal to ``rank`` it is LoRA of one rank.
        high_blocks: how many these are. None: 4, or all where there are fewer.
        scheme: top (``rank`` and ``high_rank``) or proportional (to the importance, under ``budget``).
        budget: sum of the blocks' ranks in the proportional scheme. None: what the top scheme would come to.
        scaling: factor of B A (alpha / r), the same at every rank.
        init_std: standard deviation of A at initialisation; B starts from 0.

    Raises:
        UsageError: if a value is not allowed.
    """

    rank: int = 4
    high_rank: int = 8
    high_blocks: int | None = None
    scheme: str = "top"
    budget: int | None = None
    scaling: float = 1.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_types(self, "lora")
        check_choices(self, "lora", scheme=("top", "proportional"))
        if self.rank < 1:
            raise UsageError(f"lora.rank = {self.rank}: must be at least 1")
        if self.high_rank < self.rank:
            raise UsageError(f"lora.high_rank = {self.high_rank}: must be at least lora.rank = {self.rank}")
        if self.high_blocks is not None and self.high_blocks < 0:
            raise UsageError(f"lora.high_blocks = {self.high_blocks}: must be at least 0, or null")
        if not self.init_std > 0:  # with A = B = 0 neither gets a gradient
            raise UsageError(f"lora.init_std = {self.init_std}: must be above 0")
        if self.budget is not None and self.scheme == "top":
            raise UsageError(f"lora.budget = {self.budget}: is for lora.scheme proportional")

    @property
    def varied(self) -> bool:
        """Whether blocks get different ranks."""
        return self.scheme == "proportional" or (self.high_rank != self.rank and self.high_blocks != 0)
