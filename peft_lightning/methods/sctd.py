"""SCTD (Zhong et al., 2023, arXiv:2305.15273): BERT pretraining with token dropping and semantic-consistent steps.

Equation 4 with symbol = variable, at optimizer step t = 1, 2, ...:

    t mod Fi != 0:  L*                                                     (token dropping, layers/token_drop)
    t mod Fi == 0:  1/2 L* + 1/2 L + lambda (KL_global + KL_local)         (a full pass teaches the dropping one)

L* and L are the losses of the dropping and of the full pass, Fi = ``interval``, lambda = ``weight``; KL_global compares
the passes after the last layer, KL_local before it. Deviations:

* the paper does not say what its distributions p(X) are: a setting with presets (layers/drop_config), of which
  ``sctd`` is ours and ``sctd-released`` the released code, whose losses are not the paper's;
* no KL sends a gradient into the teacher, unless the setting says so;
* what both passes share is computed once, which is exact without dropout; with dropout both have the same draws there,
  and the KL lacks the difference of two draws (``share_prefix``). The last layer and the head see only what is
  predicted, which is exact;
* with L switched off the loss is L* + lambda (...), so that its scale stays.

Shapes: B blocks, S tokens, K kept, P targets of a block, Q queries of the last layer, D width, N = B P.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.functional.flops import forward_flops
from peft_lightning.functional.masked_lm import MaskedLM, hidden_divergence, masked_lm_loss
from peft_lightning.functional.tokens import gather_tokens, kept_length, select_tokens
from peft_lightning.layers.drop_config import DropConfig
from peft_lightning.layers.token_drop import Passes, TokenImportance
from peft_lightning.pretrain_module import Batch, PretrainModule
from peft_lightning.settings import OptimConfig, as_config

__all__ = ["SCTDPretrainModule"]


class SCTDPretrainModule(PretrainModule):
    """Pretrains a masked language model, from scratch or from a folder.

    Args:
        backbone: a configuration (random weights; without ``vocab_size`` and ``tokenizer`` the corpus decides them), or
            a folder or hub name to go on from.
        drop: what is dropped and compared.
        optim: the optimiser's settings.
        chunk: rows of logits that are alive at a time.
        seed: of initial values, dropout and ties.

    Raises:
        UsageError: if a value is not allowed, or the backbone is not one that can be driven.
    """

    fixed_by_file = (*PretrainModule.fixed_by_file, "drop")

    def __init__(
        self,
        backbone: str | BackboneConfig,
        drop: DropConfig = DropConfig(),
        optim: OptimConfig = OptimConfig(lr=2e-4),
        chunk: int = 1024,
        seed: int = 42,
    ) -> None:
        super().__init__(backbone=backbone, optim=optim, chunk=chunk, seed=seed)
        self.drop = as_config(DropConfig, drop)
        self._terms: list[Tensor] = []
        self.record(drop=self.drop)

    def build(self) -> None:
        """Model, and the importance of its words."""
        super().build()
        config: Any = self.model.config
        ids = {name: getattr(self.tokenizer, f"{name}_token_id", None) for name in ("unk", "cls", "sep", "mask", "pad")}
        never = [i for i in (ids.pop("pad"),) if i is not None and i not in ids.values()]
        self.importance = TokenImportance(config.vocab_size, [i for i in ids.values() if i is not None], never)
        self._compiled: dict[int, Any] = {}

    def declared(self) -> Iterator[nn.Module]:
        """The whole model, and the importance of words."""
        yield self.model
        yield self.importance

    @property
    def drops(self) -> bool:
        """Whether tokens are dropped at all."""
        return self.drop.preset != "mlm"

    def summary(self) -> dict[str, Any]:
        """Method, architecture, trained parameters, and what is dropped."""
        names = ("keep", "interval", "full_loss", "global_kl", "local_kl", "share_prefix", "detach", "beta")
        settings = {name: self.drop.of(name) for name in names} if self.drops else {}
        return {**super().summary(), "preset": self.drop.preset, **settings}

    # -- a step ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch: an ordinary or a semantic-consistent step, by the number of optimizer steps."""
        loss, found, terms = self.losses(batch, self.drop.passes(self.trainer.global_step + 1))
        if self.drops:
            self.importance.collect(batch["labels"].flatten(), found.token_losses)
        if terms is not None:
            self._terms.append(terms)
        weight = loss.detach().new_full((), float(batch["labels"].numel()))
        return self.normalised(loss * weight, weight, alike=True)

    def _run(self, *args: Any, **options: Any) -> Passes:
        """The engine, compiled if so set; evaluation, whose shapes may vary, calls the engine itself."""
        if not self.backbone_config.compile:
            return self.engine(*args, **options)
        if id(self.engine) not in self._compiled:  # a copy of this module has another engine
            self._compiled = {id(self.engine): torch.compile(self.engine.__call__, dynamic=False)}
        passes: Passes = self._compiled[id(self.engine)](*args, **options)
        return passes

    def on_train_start(self) -> None:
        """Begin with nothing collected: a fit that was interrupted may have left some."""
        super().on_train_start()
        self._terms = []
        self.importance.forget()

    def losses(self, batch: Batch, passes: str) -> tuple[Tensor, MaskedLM, Tensor | None]:
        """Loss of a batch.

        Args:
            batch: as :class:`PretrainModule` says.
            passes: dropping, full or both.

        Returns:
            The loss, a scalar; the cross-entropies of the dropping pass (of the full one, if that is the only one); and
            L*, L (NaN where nothing needs it), KL_global, KL_local and the share of the KL terms in the loss, detached,
            if there are both passes.
        """
        ids_BS, labels_N = batch["input_ids"], batch["labels"].flatten()
        both, weight = passes == "both", self.drop.of("weight")
        run = self._run(
            ids_BS,
            self._queries(batch) if both else batch["targets"],
            None if passes == "full" else self.choose(ids_BS, batch.get("noise")),
            full=passes != "dropping",
            share_prefix=self.drop.of("share_prefix"),
            sparse_last=self.drop.sparse_last,
            teacher_learns=not both or self.drop.teacher_learns,
            mask_BSS=self.sight(batch),
        )
        student, teacher = (run.teacher, None) if run.student is None else (run.student, run.teacher)
        assert student is not None
        a_teacher = 0.5 if both and self.drop.of("full_loss") == "teacher" else 0.0
        words = both and self.drop.of("global_kl") == "masked_logits"
        c = weight if words else 0.0
        found = masked_lm_loss(
            self._head_input(student, batch["targets"]),
            self._head_input(teacher, batch["targets"]) if teacher is not None and a_teacher + c else None,
            *self.engine.output_layer(),
            labels_N,
            factors=(1.0 - a_teacher, a_teacher, c),
            detach=self.drop.of("detach"),
            chunk=self.chunk,
        )
        if not both:
            return found.loss, found, None
        global_kl, local_kl = self._hidden_kl(run, labels_N.numel())
        loss = found.loss + weight * (global_kl + local_kl)
        global_kl = found.divergence if words else global_kl.detach()
        share = weight * (global_kl + local_kl.detach()) / loss.detach()
        full = found.teacher if a_teacher + c else torch.full_like(share, torch.nan)
        return loss, found, torch.stack([found.student, full, global_kl, local_kl.detach(), share])

    def _queries(self, batch: Batch) -> Tensor:
        """Where both passes need the last layer: at the targets, and where KL_global compares them."""
        everywhere_S = torch.arange(batch["input_ids"].shape[1], device=batch["targets"].device)
        positions_BS = everywhere_S.expand(len(batch["targets"]), -1)
        if self.drop.of("global_kl") == "all_hidden":
            return positions_BS
        return torch.cat([batch["targets"], positions_BS[:, : self.drop.of("global_kl") == "cls_hidden"]], dim=1)

    def _head_input(self, hidden_BQD: Tensor, targets_BP: Tensor) -> Tensor:
        """What the output layer takes, ``[N, E]``, of the last layer's states at the queries."""
        if self.drop.of("global_kl") == "all_hidden" and hidden_BQD.shape[1] != targets_BP.shape[1]:
            hidden_BQD = gather_tokens(hidden_BQD, targets_BP)
        return self.engine.transform(hidden_BQD[:, : targets_BP.shape[1]]).flatten(0, 1)

    def _hidden_kl(self, run: Passes, targets: int) -> list[Tensor]:
        """KL_global and KL_local over hidden states; zero where another distribution is compared, or none."""
        found = []
        for name in ("global_kl", "local_kl"):
            choice = self.drop.of(name)
            if choice in ("masked_logits", "none"):
                found.append(torch.zeros((), device=self.device))
                continue
            pair = run.compared(choice, before=name == "local_kl")
            divergence = hidden_divergence(*pair, detach=self.drop.of("detach"))
            found.append(divergence * len(pair[0]) / targets if choice == "cls_hidden" else divergence)
        return found

    def work(self, batch: Batch) -> dict[str, Any]:
        """What a micro-batch of the step at hand costs to train on: tokens, flops, and whether a teacher runs."""
        blocks, length = batch["input_ids"].shape
        passes = self.drop.passes(self.trainer.global_step + 1)
        forward = forward_flops(
            self.shape(),
            length,
            batch["targets"].shape[1],
            None if passes == "full" else kept_length(length, self.drop.of("keep")),
            full=passes != "dropping",
            share_prefix=self.drop.of("share_prefix"),
            sparse_last=self.drop.sparse_last and not (passes == "both" and self.drop.of("global_kl") == "all_hidden"),
        )
        flops = 3.0 * blocks * forward  # the backward pass has two products for each of the forward pass
        return {"tokens": blocks * length, "flops": flops, "teacher": passes == "both", "kind": passes}

    @torch.no_grad()
    def choose(self, ids_BS: Tensor, noise_BS: Tensor | None = None) -> Tensor:
        """Positions ``[B, K]``, ascending, of the tokens that stay; noise in [0, 1) orders equal ones."""
        if noise_BS is None:
            noise_BS = torch.rand(ids_BS.shape, device=ids_BS.device)
        scores_BS = self.importance.scores(ids_BS, random=self.drop.of("selection") == "random")
        return select_tokens(scores_BS, kept_length(ids_BS.shape[1], self.drop.of("keep")), noise_BS)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the importance of words, and log the terms of a semantic-consistent step."""
        skipped = self.skipped_steps
        super().on_before_optimizer_step(optimizer)
        terms, self._terms = self._terms, []
        if self.skipped_steps > skipped:
            self.importance.forget()
            return
        if self.drops:
            self.importance.update(self.drop.of("beta"), self.summed)
        step, interval = self.trainer.global_step + 1, self.drop.of("interval")
        every = getattr(self.trainer, "log_every_n_steps", 0)
        if terms and every and (step // interval) % max(1, every // interval) == 0:
            values = (self.summed(torch.stack(terms).mean(0)) / self.trainer.world_size).tolist()
            names = ("masked_lm", "full_masked_lm", "global_kl", "local_kl", "kl_share")
            named = {f"train/{name}": value for name, value in zip(names, values, strict=True)}
            self.write_log({name: value for name, value in named.items() if value == value}, step)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluated(self, batch: Batch) -> dict[str, Tensor]:
        """Last hidden states ``[B, P, D]`` of the full pass, and under ``dropped_`` of the dropping one."""
        keep_BK = self.choose(batch["input_ids"], batch.get("noise")) if self.drops else None
        run = self.engine(batch["input_ids"], batch["targets"], keep_BK, full=True, mask_BSS=self.sight(batch))
        assert run.teacher is not None
        return {"": run.teacher} | ({} if run.student is None else {"dropped_": run.student})
