"""LightningCLI for all methods: ``fit``, ``validate``, ``test``, ``predict``, each run in a folder of its own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

import peft_lightning.callbacks.drift
import peft_lightning.data.corpus
import peft_lightning.data.few_shot
import peft_lightning.data.supervised
import peft_lightning.methods  # noqa: F401
from peft_lightning.atomic import atomic_write, atomic_write_together
from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.callbacks.checkpoint import RunCheckpoint
from peft_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.callbacks.progress import ProgressLine
from peft_lightning.callbacks.report import Report
from peft_lightning.callbacks.throughput import Throughput
from peft_lightning.cli.classes import check_built, restrict_classes
from peft_lightning.cli.drawing import draw_decisions
from peft_lightning.cli.launching import check_launcher, check_options, check_processes
from peft_lightning.cli.recorded import joined, option, refuse_linked, with_recorded_settings, with_texts
from peft_lightning.cli.resuming import RESUME, checkpoint_to_resume
from peft_lightning.cli.running import Agreed, Held, Kept, listed, placed
from peft_lightning.cli.yaml_files import restrict_values
from peft_lightning.cli.zero_shot import check_zero_shot, require_checkpoint
from peft_lightning.errors import UsageError, first_line
from peft_lightning.files.manifest import MANIFEST_KEY, read_file
from peft_lightning.files.strict import check_settings
from peft_lightning.module import MethodModule
from peft_lightning.task_module import TaskModule

__all__ = ["TrainerCLI", "run"]


class TrainerCLI(LightningCLI):
    """One command line for every method; the class path chooses it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's folder, resuming, and the links that keep the five choices consistent."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="the run's folder")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="'auto': go on from the run folder's last checkpoint; 'changed': so too with other settings",
        )
        parser.add_argument("--zero_shot", type=bool, default=False, help="true: a model that nothing has trained")
        parser.add_argument("--save_every_n_steps", type=int, default=200, help="optimizer steps between checkpoints")
        parser.link_arguments("data.init_args.task", "model.init_args.task")
        parser.link_arguments("data.init_args.max_length", "model.init_args.max_length")
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("model.init_args.backbone", "data.init_args.tokenizer", compute_fn=_tokenizer_of)
        restrict_values(parser)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Loading is always safe, so the switch for it is not offered."""
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check what Lightning would stumble over before it does."""
        super().parse_arguments(parser, args)
        check_built(self.config[self.config["subcommand"]])
        check_options(self.config[self.config["subcommand"]])

    def _parse_ckpt_path(self) -> None:
        """Nothing: flags given beside a checkpoint must not be overridden by what it holds."""

    # -- the run's folder --------------------------------------------------------------------------------------

    @property
    def options(self) -> Any:
        """The parsed options of the chosen command."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and refuse what cannot go on, before anything is loaded."""
        options = self.options
        # The flag, not what some configuration file says: what the checkpoint records was read by the flag.
        if self.subcommand != "fit" and (path := option(sys.argv, "--ckpt_path")):
            options.ckpt_path = path
            options.run_dir = options.run_dir or str(Path(path) if Path(path).is_dir() else Path(path).parent)
            return
        if options.run_dir is None:
            method = options.model.class_path.rpartition(".")[2].removesuffix("Module")
            name = f"{method}-{_task_name(options.data.init_args.get('task'))}-{options.seed_everything}"
            options.run_dir = f"runs/{name}" if self.subcommand == "fit" else f"runs/{name}-zero_shot"
        if self.subcommand != "fit":
            options.ckpt_path = None
            return
        folder = Path(options.run_dir)
        if options.resume not in (None, *RESUME):
            raise UsageError(f"--resume = {options.resume!r}: must be {' or '.join(map(repr, RESUME))}")
        if options.resume and options.ckpt_path:
            raise UsageError(f"--resume {options.resume} and --ckpt_path: give one of them")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--run_dir = {folder}: is a file; must be a folder")
        # A run that failed before its first checkpoint leaves its configuration only: nothing to protect.
        harmless = {".lock", "config.yaml", "tensorboard"}
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
        taken = {name for name in names - harmless if not name.endswith(".tmp")}
        if _first_rank() and taken and not options.resume and not options.trainer.fast_dev_run:
            raise UsageError(
                f"--run_dir = {folder}: exists already; add --resume auto to go on with it, or name another folder"
            )
        self._held = Held(folder)
        if options.resume:
            if folder.is_dir() and _first_rank() and not options.trainer.fast_dev_run:
                self._held.take()  # before the look for what there is to go on from
            last = checkpoint_to_resume(folder, self._effective(), options.resume, speaks=_first_rank())
            options.ckpt_path = None if last is None else str(last)

    def _effective(self) -> dict[str, Any]:
        parser = self._parser(self.subcommand)
        dumped = parser.dump(self.options, skip_unset=False, skip_validation=True)
        config = with_texts(yaml.safe_load(dumped), self.options.as_dict())
        # What to go on from belongs to one start of the run, not to the run.
        return {
            key: value for key, value in config.items() if key not in ("ckpt_path", "resume", "config", "zero_shot")
        }

    # -- the trainer -------------------------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The configured trainer with the run's folder, loggers, checkpoints, progress and report."""
        config = self._get(self.config_init, "trainer", default={})
        folder = Path(self.options.run_dir)
        trial = bool(config.get("fast_dev_run"))  # leaves nothing behind
        callbacks: list[L.Callback] = [Throughput()] if trial else [Report(folder), Throughput()]
        if config.get("enable_progress_bar") is not False:
            callbacks.insert(0, ProgressLine())
        checkpoints = self.subcommand == "fit" and config.get("enable_checkpointing") is not False and not trial
        if checkpoints:
            callbacks += [RunCheckpoint(folder, self.options.save_every_n_steps), self._held]
        loggers: Any = config.get("logger")
        if loggers in (None, True):
            loggers = self._loggers(folder) if self.subcommand == "fit" and not trial else False
        elif loggers and self.subcommand == "fit" and not trial:  # in the place of TensorBoard
            loggers = [MetricsCSV(folder), *listed(loggers)]
        try:
            trainer = super().instantiate_trainer(
                default_root_dir=str(folder),
                logger=loggers,
                enable_checkpointing=checkpoints,
                callbacks=[Agreed(self.options.ckpt_path), *placed(config.get("callbacks"), folder), *callbacks],
                plugins=[*listed(config.get("plugins")), AtomicCheckpointIO()],
                **kwargs,
            )
        except (TypeError, ValueError, ModuleNotFoundError) as error:  # options that do not go together or work here
            raise UsageError(f"trainer: {first_line(error)}") from error
        check_processes(trainer)
        return trainer

    def _loggers(self, folder: Path) -> list[Any]:
        purge = None
        if self.options.ckpt_path:
            purge = int(read_file(self.options.ckpt_path).get("global_step", 0)) + 1
        return [
            MetricsCSV(folder),
            TensorBoardLogger(folder, name="tensorboard", version="", purge_step=purge),
        ]

    # -- commands ----------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Write the effective configuration into the run's folder and into the module's manifest.

        The one that is there stays until the checkpoint is taken over: what it refuses was never a run's configuration.
        """
        effective = self._effective()
        self.model.run_config = {key: effective.get(key) for key in ("data",)}
        if not _first_rank() or self.options.trainer.fast_dev_run:
            return
        path, text = Path(self.options.run_dir) / "config.yaml", yaml.safe_dump(effective, sort_keys=False)
        before = path.read_bytes() if self.options.ckpt_path and path.exists() else None
        if before is not None:
            self.trainer.callbacks.append(Kept(path, text))  # type: ignore[attr-defined]
        # also the same again: a folder that cannot be written is to be said before anything begins
        atomic_write(path, lambda file: file.write(text.encode() if before is None else before))

    def after_fit(self) -> None:
        """Draw what the method decided, where a person would rather look than read."""
        if not self.trainer.is_global_zero or self.options.trainer.fast_dev_run:
            return
        draw_decisions(self.model.summary(), Path(self.options.run_dir))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        path = self.options.ckpt_path
        if not path and subcommand != "fit":
            check_zero_shot(self.model)
        if path and subcommand == "fit" and Path(path).is_dir():
            raise UsageError(f"--ckpt_path = {path}: must be a .ckpt file")
        if path:
            # One clear line for a damaged file or a flag that the file overrules, before the trainer starts.
            content = read_file(path)
            check_settings(content[MANIFEST_KEY]["hyper_parameters"], self.model.hparams, self.model.fixed_by_file)
            self.model.before_data(content)
            if Path(path).is_dir():  # a run's folder, or an adapter's, which Lightning cannot read
                self.model.on_load_checkpoint(content)
                self.model.load_state_dict(content["state_dict"])
                path = None
        arguments |= {"ckpt_path": path, "weights_only": True}
        if subcommand in ("validate", "test"):
            arguments["verbose"] = False
        return arguments

    def predict(self, **arguments: Any) -> None:
        """Write ``predictions.jsonl``: one line per row of the split, in its order; and the task's official form."""
        arguments["return_predictions"] = True
        answers = [answer for batch in self.trainer.predict(**arguments) or [] for answer in batch]
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, answers)
            answers = [answer for part in gathered for answer in part]
        if self.trainer.is_global_zero:
            answers.sort(key=lambda answer: answer["row"])
            folder, name = Path(self.options.run_dir), "predictions.jsonl"
            files = self.model.kind.official(answers) if isinstance(self.model, TaskModule) else {}
            files[name] = "".join(f"{json.dumps(answer)}\n" for answer in answers)
            atomic_write_together(folder, {file: text.encode() for file, text in files.items()})
            Console(soft_wrap=True, markup=False).print(f"{len(answers):,} answers in {folder / name}")


def run(words: list[str]) -> None:
    """Parse ``words`` (the command first) and carry the command out.

    Raises:
        UsageError, ArgumentError: for wrong options.
        PeftLightningError: for anything else that the user can act on.
    """
    check_launcher()
    require_checkpoint(words)
    refuse_linked(words)
    restrict_classes()
    with tempfile.TemporaryDirectory() as folder, Held.released():
        words = joined(with_recorded_settings(words, Path(folder)))
        parser_options = {"exit_on_error": False, "allow_abbrev": False}  # what the words are is looked at before
        sys.argv[1:] = words  # what further local processes (DDP) are started with
        TrainerCLI(
            MethodModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=42,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, "log_every_n_steps": 10},
            parser_kwargs={**parser_options, **{name: parser_options for name in TrainerCLI.subcommands()}},
        )


def _tokenizer_of(backbone: Any) -> str | None:
    if backbone is None or isinstance(backbone, str):
        return backbone
    return BackboneConfig.tokenizer_of(backbone.get("name"), backbone.get("tokenizer"), backbone.get("revision"))


def _task_name(task: Any) -> str:
    """The name of a row of the task table, or of a row that is written out."""
    if task is None or isinstance(task, str):
        return task or "corpus"
    return str((task.get("init_args") or task).get("name"))


def _first_rank() -> bool:
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
