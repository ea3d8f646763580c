"""Adapters from other libraries into a module, and back: AdapterHub's folders and Hugging Face PEFT's.

Neither library is needed. Pruned models go out to transformers, PEFT and ONNX. Adapters of any of these formats are
merged into one.
"""

from __future__ import annotations

from peft_lightning.exchange.merging import MERGE_FORMATS, merge_adapters
from peft_lightning.exchange.notes import ExchangeWarning
from peft_lightning.exchange.pruned import load_pruned
from peft_lightning.exchange.reading import import_adapter
from peft_lightning.exchange.writing import FORMATS, export_adapter

__all__ = [
    "FORMATS",
    "MERGE_FORMATS",
    "ExchangeWarning",
    "export_adapter",
    "import_adapter",
    "load_pruned",
    "merge_adapters",
]
