"""Parameter-efficient training of language models on PyTorch Lightning.

The public names, nothing else; they are imported when first used, so that ``import peft_lightning`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_lightning.backbones.build import BackboneConfig
    from peft_lightning.callbacks.checkpoint import RunCheckpoint
    from peft_lightning.data.corpus import MLMDataModule
    from peft_lightning.data.few_shot import FewShotDataModule
    from peft_lightning.data.supervised import TaskDataModule
    from peft_lightning.exchange import export_adapter, import_adapter, load_pruned, merge_adapters
    from peft_lightning.layers.adapters import AdapterConfig
    from peft_lightning.layers.drop_config import DropConfig
    from peft_lightning.layers.merge_config import MergeConfig
    from peft_lightning.layers.prune_config import ImportanceConfig, RankConfig, StructureConfig
    from peft_lightning.loading import load
    from peft_lightning.methods.fine_tune import FineTuneModule
    from peft_lightning.methods.fusion import FusionModule
    from peft_lightning.methods.mera import MerAModule
    from peft_lightning.methods.prune_lora import PruneLoRAModule
    from peft_lightning.methods.sctd import SCTDPretrainModule
    from peft_lightning.methods.sparse_adapter import PruneConfig, SparseAdapterModule
    from peft_lightning.settings import OptimConfig
    from peft_lightning.tasks.table import Task

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "BackboneConfig",
    "DropConfig",
    "FewShotDataModule",
    "FineTuneModule",
    "FusionModule",
    "ImportanceConfig",
    "MLMDataModule",
    "MerAModule",
    "MergeConfig",
    "OptimConfig",
    "PruneConfig",
    "PruneLoRAModule",
    "RankConfig",
    "RunCheckpoint",
    "SCTDPretrainModule",
    "SparseAdapterModule",
    "StructureConfig",
    "Task",
    "TaskDataModule",
    "export_adapter",
    "import_adapter",
    "load",
    "load_pruned",
    "merge_adapters",
]

_HOME = {
    "AdapterConfig": "layers.adapters",
    "BackboneConfig": "backbones.build",
    "DropConfig": "layers.drop_config",
    "FewShotDataModule": "data.few_shot",
    "FineTuneModule": "methods",
    "FusionModule": "methods",
    "ImportanceConfig": "layers.prune_config",
    "MLMDataModule": "data.corpus",
    "MerAModule": "methods",
    "MergeConfig": "layers.merge_config",
    "OptimConfig": "settings",
    "PruneConfig": "methods.sparse_adapter",
    "PruneLoRAModule": "methods",
    "RankConfig": "layers.prune_config",
    "RunCheckpoint": "callbacks.checkpoint",
    "SCTDPretrainModule": "methods",
    "SparseAdapterModule": "methods",
    "StructureConfig": "layers.prune_config",
    "Task": "tasks.table",
    "TaskDataModule": "data.supervised",
    "export_adapter": "exchange",
    "import_adapter": "exchange",
    "load": "loading",
    "load_pruned": "exchange",
    "merge_adapters": "exchange",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
