"""Several cells' adapters over one frozen backbone, in one batch.

Each cell has a block of the batch, as many rows and tokens as the longest needs. Cells that read the same rows share
the layers below their first adapter: their rows pass through these once, and are spread over the blocks after them.
Where heads read the first token only, the last layer computes no others behind its attention.

Shapes: n cells, u of them with rows of their own, B rows of a block, L tokens, H width of the backbone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_lightning.backbones.build import build_backbone
from peft_lightning.backbones.families import family_of
from peft_lightning.backbones.pooling import pooling
from peft_lightning.backbones.sharing import SharedBackbones
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.side_by_side import attach_side_by_side
from peft_lightning.seeding import seeded_on_cpu
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.batch import Batch

__all__ = ["Block", "shape_of"]

_KINDS = ("houlsby", "pfeiffer", "parallel")
_STEPS = ("training_step", "batch_loss", "head_loss", "states", "pooled", "on_train_batch_start")
# Where the last layer goes on with single tokens, behind its attention.
_BEHIND = {"bert": "attention.output", "roberta": "attention.output", "electra": "attention.output"}
# Their stack compares what goes into its first layer with what comes out.
_UNSPREAD = ("deberta-v2",)


class Block:
    """Makes n modules' states at once.

    Args:
        modules: built, of equal :func:`shape_of`; they stay whole, and what trains is theirs.

    Raises:
        UsageError: their adapters are not at the same sites.
    """

    def __init__(self, modules: Sequence[TaskModule]) -> None:
        self.modules = tuple(modules)
        first: Any = modules[0]
        with seeded_on_cpu(first.seed):  # the state that a random backbone was drawn from
            self.backbone = build_backbone(first.backbone_config).requires_grad_(False)
        self.backbone.to(first.device)
        groups = [
            {path.rpartition(".adapters.")[0]: layer for path, layer in cast(Any, module).adapters.items()}
            for module in modules
        ]
        layers = attach_side_by_side(self.backbone, first.adapter.kind, groups)
        self._first = next(iter(layers.values()))
        self._known = set(inspect.signature(type(self.backbone).forward).parameters)
        config: Any = self.backbone.config
        self._padding = {"input_ids": config.pad_token_id or 0}
        self._spreads = first.adapter.kind == "pfeiffer" and config.model_type not in _UNSPREAD
        self._rows: Tensor | None = None
        self._attention = config._attn_implementation
        drops = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0))
        left_open = first.backbone_config.attention == "auto"
        self._plain_in_training = bool(drops) and left_open and first.device.type == "cpu"
        stack = [path for path in family_of(config.model_type).layers(config)]
        starts = next(i for i, path in enumerate(stack) if next(iter(layers)).startswith(path))
        for path in stack[starts + 1 :]:
            self.backbone.get_submodule(path).register_forward_pre_hook(self._spread_masks, with_kwargs=True)
        reads_one = pooling(config) == "first" and not any(module.kind.per_token for module in modules)
        if reads_one and config.model_type in _BEHIND:
            behind = self.backbone.get_submodule(f"{stack[-1]}.{_BEHIND[config.model_type]}")
            behind.register_forward_pre_hook(_first_token)

    def states(self, batches: Sequence[Batch]) -> list[Tensor]:
        """What each cell's head reads of its batch; cells that read the same rows give the same object."""
        given = [module.inputs(batch) for module, batch in zip(self.modules, batches, strict=True)]
        own: dict[int, Mapping[str, Tensor]] = {id(b): i for b, i in zip(batches, given, strict=True)}
        places = {key: place for place, key in enumerate(own)}
        inputs, size = self._joined(list(own.values()))
        starts = [places[id(batch)] * size for batch in batches]
        rows = torch.cat([torch.arange(start, start + size) for start in starts]).to(inputs["input_ids"].device)
        if len(own) == len(batches):
            hidden = self._run(inputs, None)
        elif self._spreads:
            hidden = self._run(inputs, rows)
        else:
            hidden = self._run({name: tensor[rows] for name, tensor in inputs.items()}, None)
        parts = zip(self.modules, given, hidden.split(size), strict=True)
        return [module.pooled(_cut(part_BLH, one), one) for module, one, part_BLH in parts]

    def train(self, mode: bool) -> None:
        """Set backbone and modules to training or evaluation.

        On a processor torch's fused attention computes dropout in steps that take twice the time of plain attention.
        """
        config: Any = self.backbone.config
        if self._plain_in_training:
            config._attn_implementation = "eager" if mode else self._attention
        self.backbone.train(mode)
        for module in self.modules:
            module.train(mode)

    def _run(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Tensor:
        """The backbone's last states ``[n B, L, H]``."""
        self._rows = self._first.spread = rows
        self._before = len(inputs["input_ids"])
        return cast(Tensor, self.backbone(**inputs).last_hidden_state)

    def _joined(self, given: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
        """Inputs ``[u B, L]``, and B."""
        size = max(len(inputs["input_ids"]) for inputs in given)
        length = max(inputs["input_ids"].shape[1] for inputs in given)
        names = [name for name in given[0] if name in self._known]
        return {
            name: torch.cat([_filled(inputs[name], size, length, self._padding.get(name, 0)) for inputs in given])
            for name in names
        }, size

    def _spread_masks(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the layers after the first adapter: masks have four dimensions."""
        if self._rows is None:
            return None
        return tuple(map(self._spread, args)), {name: self._spread(value) for name, value in kwargs.items()}

    def _spread(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 4 and len(value) == self._before:
            return value[self._rows]
        return value


def shape_of(module: TaskModule, shared: SharedBackbones) -> tuple[Any, ...] | None:
    """What modules must have in common to be trained in one :class:`Block`; None where one trains alone.

    Args:
        module: built.
        shared: knows whether the backbone is the frozen one of all.
    """
    adapters: Any = getattr(module, "adapters", None)
    adapter: Any = getattr(module, "adapter", None)
    if not isinstance(adapters, dict) or not all(isinstance(layer, Bottleneck) for layer in adapters.values()):
        return None
    if any(getattr(type(module), name) is not getattr(TaskModule, name) for name in _STEPS):
        return None
    config: Any = module.backbone.config
    if adapter.kind not in _KINDS or adapter.cross or module.kind.generates or config.is_encoder_decoder:
        return None
    ours = {id(p) for layer in (*adapters.values(), module.head) for p in layer.parameters()}
    if {id(p) for p in module.trainable_parameters().values()} - ours:
        return None
    if not all(shared.shares(p for p in module.backbone.parameters() if id(p) not in ours)):
        return None
    layers = tuple((path, *_shape(layer)) for path, layer in adapters.items())
    random = None if module.backbone_config.name else module.seed
    return adapter.kind, layers, repr(module.backbone_config), random


def _shape(layer: Bottleneck) -> tuple[Any, ...]:
    return layer.adapter_up.in_features, repr(layer.adapter_down[1]), layer.scaling


def _filled(tensor: Tensor, size: int, length: int, padding: int) -> Tensor:
    """``[B, L]`` of a smaller tensor: tokens that a mask hides, and the first row again, which nobody reads."""
    more = tensor.new_full((len(tensor), length - tensor.shape[1]), padding)
    tensor = torch.cat([tensor, more], 1)
    return torch.cat([tensor, tensor[:1].expand(size - len(tensor), -1)])


def _first_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: what the attention gave, and what it was given, of the token that heads read."""
    return tuple(states_BLH[:, :1] for states_BLH in args)


def _cut(hidden_BLH: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    rows, length = inputs["input_ids"].shape
    return hidden_BLH[:rows, :length]
