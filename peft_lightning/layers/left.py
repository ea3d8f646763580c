"""What is left of a pruned backbone, in numbers and in lines for people: heads, neurons, parameters, operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_lightning.layers.plan import PrunePlan
from peft_lightning.layers.pruned_heads import attention_sites
from peft_lightning.layers.unit_costs import layer_flops

__all__ = ["left_lines", "left_of", "whole_of"]


def whole_of(backbone: nn.Module, tokens: int) -> dict[str, Any]:
    """Sizes of a backbone before anything is taken out of it.

    Args:
        backbone: a bare model of transformers.
        tokens: length of the text that operations are counted for.

    Returns:
        ``parameters``, with embeddings; ``flops``, of its layers on one text; ``tokens``; ``unit``: what is pruned of
        an attention, ``heads``, or ``head groups`` where several share their keys.

    Raises:
        UsageError: if the architecture is not known.
    """
    sites = attention_sites(backbone).values()
    return {
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "flops": layer_flops(backbone, tokens),
        "tokens": tokens,
        "unit": "head groups" if any(site.width > site.key_width for site in sites) else "heads",
    }


def left_of(backbone: nn.Module, plan: PrunePlan, whole: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes after pruning beside those before, for a report; LoRA is not counted with the backbone.

    Args:
        backbone: pruned by the plan.
        plan: the decisions.
        whole: of :func:`whole_of`, before.
    """
    left = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    lora = sum(count for name, count in left.items() if ".loras." in name)
    parameters, flops = sum(left.values()) - lora, layer_flops(backbone, whole["tokens"])
    return {
        "parameters": parameters,
        "parameters_before": whole["parameters"],
        "parameters_share": parameters / whole["parameters"],
        "flops": flops,
        "flops_before": whole["flops"],
        "flops_share": flops / whole["flops"],
        "flops_tokens": whole["tokens"],
        "unit": whole["unit"],
        **plan.counts(),
        "heads_by_attention": {path: len(kept) for path, kept in plan.heads.items()},
        "ranks": dict(plan.ranks),
        "lora_parameters": lora,
    }


def left_lines(left: Mapping[str, Any]) -> dict[str, str]:
    """The same as lines of a table."""
    by_attention = " ".join(map(str, left["heads_by_attention"].values()))
    rows = {f"{left['unit']} kept": f"{left['heads']:,} of {left['heads_before']:,}   (by attention: {by_attention})"}
    if left["neurons_before"]:
        rows["neurons kept"] = f"{left['neurons']:,} of {left['neurons_before']:,}"
    return {
        **rows,
        "backbone left": f"{left['parameters']:,} of {left['parameters_before']:,} parameters "
        f"({left['parameters_share']:.1%})",
        "operations left": f"{left['flops_share']:.1%} of the layers' on a text of {left['flops_tokens']} tokens",
        "LoRA ranks": " ".join(map(str, left["ranks"].values())),
    }
