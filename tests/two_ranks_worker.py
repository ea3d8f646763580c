"""Run by test_two_ranks.py and test_nodes.py: trains every method and writes down what each process ends with.

Usage: python -m tests.two_ranks_worker FOLDER, or torchrun -m tests.two_ranks_worker FOLDER for several processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

from peft_lightning.data.toy import toy_rows
from peft_lightning.methods import FusionModule, MerAModule, PruneLoRAModule, SCTDPretrainModule, SparseAdapterModule
from tests.families import backbone_setting
from tests.toy import METHODS, build, data, tiny, toy_sources, trainer

# name -> options of module and trainer; the second makes every micro-batch weigh differently
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "weighed": ({"class_weights": [1.0, 4.0]}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
}
# What one method adds: other adapters, scores with more passes over the data, other architectures.
SPARSE: dict[str, dict[str, Any]] = {
    "lora-grasp": {"adapter": {"kind": "lora", "bottleneck": 4, "init_std": 0.2}, "prune": {"score": "grasp"}},
    "mam-warmup": {"adapter": {"kind": "mam", "bottleneck": 4}, "prune": {"score_init": "warmup", "warmup_steps": 3}},
    "pfeiffer-wide": {"adapter": {"kind": "pfeiffer", "bottleneck": 4}, "prune": {"multiplier": 3}},
    "bart-parallel": {"adapter": {"kind": "parallel", "bottleneck": 4}, "backbone": backbone_setting("bart")},
    "llama-er": {"backbone": backbone_setting("llama"), "prune": {"score": "er"}},
}


# What may be cut up; compared with the run of the same name on one process.
SHARDED = [method for method in METHODS if hasattr(method, "sharded_blocks")]


# Other losses on the step with a teacher; documents apart.
SCTD: dict[str, dict[str, Any]] = {
    "paper": {"drop": {"preset": "sctd-paper", "interval": 2}},
    "released": {"drop": {"preset": "sctd-released", "interval": 2}},
    "full": {"drop": {"preset": "drop+full", "interval": 2}},
}


# Neurons too, blocks by their own gates, a classifier that learns first; another architecture; heads that are drawn.
PRUNE: dict[str, dict[str, Any]] = {
    "gates": {
        "importance": {"batches": 2, "classifier_steps": 3, "blocks": "gate"},
        "prune": {"ffn_to_prune": 0.3},
        "lora": {"rank": 2, "high_rank": 4, "high_blocks": 1},
    },
    "bart-target": {"backbone": backbone_setting("bart"), "prune": {"target": {"params": 0.9}}},
    "random": {"prune": {"order": "random", "heads_to_prune": 2}, "lora": {"rank": 4, "high_rank": 4}},
}


# Fewer tokens than there are, masks, plans without data, LoRA; weights and other sizes.
MERA: dict[str, dict[str, Any]] = {
    "tokens": {"merge": {"tokens": 60}},
    "select": {"merge": {"preset": "select", "tokens": 200}, "keep": 0.5},
    "sizes": {"merge": {"preset": "wts", "weights": [2.0, -1.0]}, "sources": [{"bottleneck": 4}, {"bottleneck": 6}]},
    "lora": {"merge": {"preset": "svd"}, "sources": [{"kind": "lora", "bottleneck": 2}, {"kind": "lora"}]},
}


def runs() -> Iterator[tuple[str, type[Any], dict[str, Any], dict[str, Any]]]:
    """Name of a run, its method, and the options of module and trainer."""
    for method in METHODS:
        for variant, (options, settings) in VARIANTS.items():
            yield f"{method.__name__}-{variant}", method, options, settings
    for variant, options in SPARSE.items():
        yield f"SparseAdapterModule-{variant}", SparseAdapterModule, options, {}
    for variant, options in PRUNE.items():
        yield f"PruneLoRAModule-{variant}", PruneLoRAModule, options, {}
    for variant, options in MERA.items():
        given = {name: value for name, value in options.items() if name not in ("sources", "keep")}
        given["sources"] = toy_sources(tiny(0.0), *options.get("sources", ()), keep=options.get("keep", 1.0))
        yield f"MerAModule-{variant}", MerAModule, given, {}
    for method in SHARDED:
        for variant, (options, settings) in VARIANTS.items():
            yield f"{method.__name__}-{variant}-fsdp2", method, options, {**settings, "strategy": "fsdp2"}
    yield "FusionModule-sparse", FusionModule, {"sources": toy_sources(tiny(0.0), keep=0.5)}, {}
    for variant, options in SCTD.items():
        yield f"SCTDPretrainModule-{variant}", SCTDPretrainModule, options, {}


def main(folder: Path, ranks: int, nodes: int) -> None:
    """One fit and one test per run, the same global batches whatever the number of ranks."""
    rows = {s: toy_rows("toy_sentiment", s, size=n) for s, n in (("train", 75), ("validation", 21), ("test", 17))}
    many: dict[str, Any] = {"devices": ranks // nodes, "num_nodes": nodes} if ranks > 1 else {}
    for name, method, options, settings in runs():
        if ranks == 1 and "strategy" in settings:
            continue
        # two processes add numbers up in another order: a large epsilon keeps Adam from making much of it
        module = build(method, dropout=0.0, optim={"lr": 1e-3, "eps": 1e-4}, **options)
        source = data(batch_size=16 // ranks, rows=rows, method=method)
        settings = {"strategy": "ddp", **settings} if ranks > 1 else settings
        fit = trainer(folder / name, max_epochs=2, **settings, **many)
        fit.fit(module, datamodule=source)
        tested = fit.test(module, datamodule=source, verbose=False)
        end = {"state": module.owned_state(), "test": tested, "plan": module.manifest().get("plan")}
        end["importance"] = module.manifest().get("importance")
        held = (getattr(p, "to_local", lambda p=p: p)().numel() for p in module.trainable_parameters().values())
        end["held"] = sum(held) / sum(p.numel() for p in module.trainable_parameters().values())
        if "-plain" in name:
            end["resumed"] = in_two_parts(method, folder / f"{name}-parts", source, options, {**settings, **many})
        torch.save(end, folder / f"{name}-{fit.global_rank}.pt")
    odd = build(MerAModule, dropout=0.0)
    fit = trainer(**many, strategy="ddp" if ranks > 1 else "auto")
    fit.validate(odd, datamodule=data(batch_size=2, rows=dict.fromkeys(rows, rows["train"][:5])), verbose=False)
    end = {"state": odd.owned_state(), "tokens": odd.merged["tokens"]}
    torch.save(end, folder / f"odd-{fit.global_rank}.pt")


class Stop(L.Callback):
    """Ends a fit in the middle of the second epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == 6


def in_two_parts(
    method: type[Any], folder: Path, source: Any, options: dict[str, Any], many: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What the same run ends with if it stops on the way and goes on from its checkpoint."""
    for last in (None, str(folder / "last.ckpt")):
        module = build(method, dropout=0.0, optim={"lr": 1e-3, "eps": 1e-4}, **options)
        stop: list[L.Callback] = [Stop()] if last is None else []
        fit = trainer(folder, max_epochs=2, callbacks=stop, **many)
        fit.fit(module, datamodule=source, ckpt_path=last, weights_only=True if last else None)
        assert (fit.global_step == 6) == (last is None)
    return dict(module.owned_state())


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    main(Path(sys.argv[1]), world, world // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
