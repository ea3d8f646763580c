"""Models of transformers with fewer heads and neurons than their configuration says, before their tensors come.

A model's class is looked up in what transformers has for the configuration's model type, by nothing else.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from peft_lightning.layers.plan import PrunePlan, apply_plan
from peft_lightning.seeding import seeded_on_cpu

__all__ = ["MODEL_FILE", "classes_of", "say_classes", "skeleton", "tensors_of"]

MODEL_FILE = "model.safetensors"
"""Name of the file of a whole model's tensors."""


def classes_of(config: Any) -> dict[str, type]:
    """The bare model's class and the sequence classifier's, by name; only what transformers has for the model type."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    found = [auto._model_mapping.get(type(config), None) for auto in (AutoModel, AutoModelForSequenceClassification)]
    return {kind.__name__: kind for kind in found if kind is not None}


def skeleton(config: Any, headed: bool, plan: PrunePlan) -> Any:
    """A pruned model whose tensors are not filled in yet.

    Raises:
        UsageError: if the plan does not fit.
    """
    from transformers.initialization import no_init_weights

    model_class = list(classes_of(config).values())[headed]
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
    with seeded_on_cpu(0), no_init_weights():
        model: Any = model_class(config, **options)
    model.tie_weights()
    apply_plan(model.base_model, plan, None)
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a model: tied weights once, under their first name."""
    first: dict[Any, str] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        first.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else name, name)
    return {name: state[name] for name in first.values()}


def say_classes(config: Any, outputs: int, labels: tuple[str, ...]) -> None:
    """Write the classes into a configuration, in place; outputs without names get transformers' own."""
    names = labels if len(labels) == outputs else [f"LABEL_{number}" for number in range(outputs)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
