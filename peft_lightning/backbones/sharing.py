"""One copy of a backbone's weights for all models that a process builds, for as long as a context lasts.

Inside of it ``build_backbone`` gives each caller a structure of its own, which may be hooked and cut, over the same
tensors. A random backbone depends on the random state: it is shared by those who would have drawn the same one, and
leaves the random state as it would have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_lightning.errors import PeftLightningError

__all__ = ["SharedBackbones", "shared", "sharing_backbones"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Held:
    backbone: nn.Module
    before: Tensor
    after: Tensor
    sums: dict[str, int]


class SharedBackbones:
    """Backbones whose tensors are handed out, and nobody may change.

    Args:
        device: where they are held.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, _Held] = {}

    def take(self, key: str, build: Callable[[], nn.Module]) -> nn.Module:
        """Return a structure of its own over the shared tensors.

        Args:
            key: of all that decides the backbone but the random state; of a random backbone the last one is kept.
            build: makes it on the CPU.
        """
        before = torch.get_rng_state()
        held = self._held.get(key)
        drawn = held is not None and not torch.equal(held.before, held.after)
        if held is None or (drawn and not torch.equal(before, held.before)):
            backbone = build()
            after = torch.get_rng_state()
            backbone = backbone.to(self.device).requires_grad_(False)
            held = self._held[key] = _Held(backbone, before, after, _sums(backbone))
        elif drawn:
            torch.set_rng_state(held.after)
        return _structure(held.backbone)

    def shares(self, parameters: Iterable[Tensor]) -> list[bool]:
        """Whether each tensor's memory is shared."""
        ours = {p.untyped_storage().data_ptr() for held in self._held.values() for p in held.backbone.parameters()}
        return [parameter.untyped_storage().data_ptr() in ours for parameter in parameters]

    def release(self, module: nn.Module) -> None:
        """Give what trains in a module memory of its own."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter, is_shared in zip(trained, self.shares(trained), strict=True):
            if is_shared:
                parameter.data = parameter.data.clone()

    def check(self) -> None:
        """Compare the tensors' bits, by sums, with those that they had at first.

        Raises:
            PeftLightningError: names the first one that was changed.
        """
        for held in self._held.values():
            now = _sums(held.backbone)
            if changed := [name for name, total in held.sums.items() if now[name] != total]:
                raise PeftLightningError(
                    f"the shared backbone was changed: {changed[0]} and {len(changed) - 1} other tensors; "
                    "what ran since the last check cannot be trusted"
                )


_active: ContextVar[SharedBackbones | None] = ContextVar("shared_backbones", default=None)


@contextmanager
def sharing_backbones(device: torch.device | str = "cpu") -> Iterator[SharedBackbones]:
    """Share the backbones that are built inside of this context."""
    found = SharedBackbones(torch.device(device))
    token = _active.set(found)
    try:
        yield found
    finally:
        _active.reset(token)


def shared(key: str, build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes, through :meth:`SharedBackbones.take` where backbones are shared."""
    active = _active.get()
    return build() if active is None else active.take(key, build)


def _structure(backbone: nn.Module) -> nn.Module:
    """A copy with parameters of its own, each frozen or not, over the same memory; buffers are copied."""
    alike = {id(p): nn.Parameter(p.detach(), requires_grad=p.is_floating_point()) for p in backbone.parameters()}
    return copy.deepcopy(backbone, {**alike})


def _sums(backbone: nn.Module) -> dict[str, int]:
    """Name -> sum of each tensor's bits, read as whole numbers."""
    return {
        name: int(p.detach().contiguous().view(_BITS[p.element_size()]).sum(dtype=torch.int64))
        for name, p in backbone.named_parameters()
    }
