"""Start here: one paper, one file. A method is a class path; there is no registry."""

from peft_lightning.methods.fine_tune import FineTuneModule
from peft_lightning.methods.fusion import FusionModule
from peft_lightning.methods.mera import MerAModule
from peft_lightning.methods.prune_lora import PruneLoRAModule
from peft_lightning.methods.sctd import SCTDPretrainModule
from peft_lightning.methods.sparse_adapter import SparseAdapterModule

__all__ = [
    "FineTuneModule",
    "FusionModule",
    "MerAModule",
    "PruneLoRAModule",
    "SCTDPretrainModule",
    "SparseAdapterModule",
]
