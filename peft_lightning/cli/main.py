"""Entry point: turns failures into one line and an exit status.

0 good, 1 failed, 2 wrong usage; 143 ended by SIGTERM, 138 by SIGUSR1, 130 by Ctrl-C (peft_lightning/stopping).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import warnings

from peft_lightning.stopping import ends_on_signals

__all__ = ["main"]

COMMANDS = {
    "fit": "train a method on a task, into a run's folder",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write a checkpoint's answers into the run's folder",
    "export": "write an adapter for AdapterHub's library or PEFT, or a pretrained model",
    "import": "read an adapter that AdapterHub's library or PEFT wrote",
    "merge": "make one adapter of several, by optimal transport (MerA) or, for LoRA, by their updates",
    "probe": "measure what each layer of a backbone knows of a sentence",
    "study": "run a grid of many small runs in one process, several side by side, and go on with it",
    "importance": "measure how much each head of a backbone matters to a task",
    "doctor": "say what this machine can do, and what would not work and why",
}
_TOOLS = ("export", "import")
_LEFT = {
    "study": ("finished cells are kept, and the same command goes on",),
    "test": ("the checkpoint is as it was",),
    "merge": ("nothing is written",),
    "fit": ("nothing was trained since it was started; what is saved stays",),
}
_TRAINER = ("fit", "validate", "test", "predict")


def main(arguments: list[str] | None = None) -> None:
    """Run ``peft-lightning`` with the given words, or with the process's own.

    Raises:
        SystemExit: always, unless all went well.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        from peft_lightning import __version__

        sys.stdout.write(f"peft-lightning {__version__}\n")
        raise SystemExit(0)
    if words[0] not in COMMANDS:
        _fail(f"{words[0]!r} is not a command; there are: {', '.join(COMMANDS)}", 2)
    if not debug:
        threading.excepthook = _thread_ended
    try:
        with ends_on_signals(*_LEFT.get(words[0], ())):
            if words[0] in _TRAINER or (words[0] != "doctor" and not {"-h", "--help"} & set(words)):
                _quieten()
            _carry_out(words)
    except BaseException as error:
        from peft_lightning.backbones.tokenizer_json import is_failure

        if debug or not is_failure(error):
            raise
        _fail(*_explain(error))


def _thread_ended(about: threading.ExceptHookArgs) -> None:
    """A logger writes in a thread of its own; what fails there comes as a line too."""
    name = about.thread.name if about.thread else "a thread"
    sys.stderr.write(f"peft-lightning: {name} ended: {about.exc_type.__name__}: {about.exc_value}\n")


def _carry_out(words: list[str]) -> None:
    """Each command imports what it needs; some answer in less time than that of another's imports."""
    if "PEFT_LIGHTNING_IMPORT" in os.environ or any(word.partition("=")[0] == "--import" for word in words):
        from peft_lightning.cli.classes import without_imports

        words = without_imports(words)
    if words[0] in _TOOLS:
        from peft_lightning.cli.tools import run_tool

        run_tool(words)
    elif words[0] == "merge":
        from peft_lightning.cli.merge import run_merge

        run_merge(words)
    elif words[0] == "probe":
        from peft_lightning.cli.probe import run_probe

        run_probe(words)
    elif words[0] == "study":
        from peft_lightning.cli.study import run_study_command

        run_study_command(words)
    elif words[0] == "doctor":
        from peft_lightning.cli.doctor import run_doctor

        run_doctor(words)
    elif words[0] == "importance":
        from peft_lightning.cli.importance import run_importance

        run_importance(words)
    else:
        from peft_lightning.cli.trainer import run

        run(words)


def _explain(error: BaseException) -> tuple[str, int]:
    from peft_lightning.errors import PeftLightningError

    seen: BaseException | None = error
    while seen is not None:  # libraries wrap what our classes raise while they are built
        if isinstance(seen, PeftLightningError):
            return str(seen), seen.exit_code
        seen = seen.__cause__ or seen.__context__
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from peft_lightning.cli.launching import lost_peer

    if gone := lost_peer(error):
        return gone, 1
    text = str(error)
    if isinstance(error, ArgumentError) or "Does not validate" in text:
        return _parse_problem(text), 2
    if isinstance(error, MisconfigurationException):
        hint = "; on a machine without one, use configs/overlays/cpu.yaml" if "backend found" in text else ""
        return f"trainer: {text.rstrip('!.')}{hint}", 2
    if isinstance(error, OSError):
        return text if error.filename else f"{text} (run again with --debug for where)", 1
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)", 1


def _parse_problem(text: str) -> str:
    """The parser explains every type that it tried, over many lines; keep the lines that say what is wrong."""
    if refused := re.search(r"Importing '([\w.]+)' is not allowed", text):
        from peft_lightning.trust import trusted

        path = refused[1]
        return (
            f"{path}: names what is not to be run or is of none of the packages {', '.join(trusted())}, so it is not "
            f"imported; --import {path.rpartition('.')[0] or path} trusts its module"
        )
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
    lines = [line.strip() for line in text.splitlines() if not line.strip().removeprefix("- ").startswith(noise)]
    telling = [line for line in lines if not line.startswith(("- Expected a <class", "- Expected a typing.Literal"))]
    telling = list(dict.fromkeys(line.removeprefix("- ") for line in telling))
    message = " ".join(line.replace("Parser key ", "option ") for line in telling)
    message = re.sub(r"Expected an? (<class '[^']*'>)\. Got value:", lambda m: f"must be {_named(m[1])}, not", message)
    if message.endswith(":"):  # what was expected stands in the noise
        message += _expected(text)
    if "are required: fit." in message:
        message += "; give a configuration, as in: peft-lightning fit --config configs/sparse_adapter.yaml"
    if re.search(r"must be .*, not (True|False)$", message):
        message += "; in YAML, put quotes around words such as yes, no, true and false"
    if message.startswith("backbone: give either"):
        message += "; null for the one that a configuration names, as in: --model.backbone.name null"
        message += " --model.backbone.config '{model_type: bert}' --model.backbone.tokenizer toy"
    if 'option "model"' in message and ("dot import path" in message or "correspond to a subclass" in message):
        import peft_lightning.methods as methods

        message += f"; methods are: {', '.join(methods.__all__)}"
    return message


def _expected(text: str) -> str:
    """The innermost types that the parser tried, and the value that it tried them on."""
    kinds = re.findall(r"Subtypes: \[(.*)\]", text)
    values = [value for value in re.findall(r"Given value: (.*)", text) if not value.startswith("NestedArg")]
    if values[:1] == ["None"]:  # the parser makes a word of it on the way in
        return " takes null only from a configuration file, not from the command line"
    return f" must be {_named(kinds[-1] if kinds else '') or 'of another type'}, not {values[0] if values else 'given'}"


def _named(kinds: str) -> str:
    """Types as the parser lists them, in words."""
    found = re.findall(r"<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[(.*?)\]|([\w.]+\[[^<]*?\])(?=,|$)", kinds)
    words = {"NoneType": "null", "bool": "true or false"}
    return " or ".join(words.get("".join(names), "".join(names)) for names in found).replace("NoneType", "null")


def _fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    sys.stderr.write(f"peft-lightning: error: {line[:1500]}\n")
    raise SystemExit(code)


def _usage() -> str:
    from peft_lightning.cli.exit_codes import EXIT_CODES

    lines = "\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items())
    codes = "\n".join(f"  {code:<12}{what}" for code, what in EXIT_CODES.items())
    return (
        "usage: peft-lightning COMMAND [--config FILE ...] [--any.option VALUE ...] [--import MODULE] [--debug]\n\n"
        f"commands:\n{lines}\n\n"
        "options of a command: peft-lightning COMMAND --help\n"
        "options of a class:   peft-lightning COMMAND --model.help SparseAdapterModule\n"
        "                      peft-lightning COMMAND --data.help TaskDataModule\n\n"
        f"exit status:\n{codes}\n"
    )


def _quieten() -> None:
    """Keep frameworks' advertisements and progress bars out of our output (takes seconds); other warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import lightning.pytorch  # noqa: F401  importing it sets the levels that are set again here

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*module.s. in eval mode.*",
        ".*callbacks used to create the checkpoint.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        r".*isinstance\(treespec, LeafSpec\).*",
    ):
        warnings.filterwarnings("ignore", message=message)
