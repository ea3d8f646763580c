"""``export`` and ``import``: adapters to and from the formats of other libraries, and pruned models to them."""

from __future__ import annotations

import sys

from peft_lightning.cli.parser import ToolParser, plain_notes

__all__ = ["run_tool"]


def run_tool(words: list[str]) -> None:
    """Carry out ``export`` or ``import``.

    Args:
        words: the command and its options.

    Raises:
        UsageError: for wrong options.
        CheckpointError: if a folder cannot be read, or a format has no words for the adapter.
        SystemExit: after ``--help``.
    """
    command, *rest = words
    with plain_notes():
        if command == "export":
            _export(rest)
        else:
            _import(rest)


def _export(words: list[str]) -> None:
    parser = ToolParser(
        prog="peft-lightning export",
        description="Write a trained adapter for AdapterHub's library, for Hugging Face PEFT (LoRA only), or as an "
        "adapter folder of our own. Masks travel as zeros, with the masks themselves in a file beside them. A "
        "pretrained model is written as a folder of Hugging Face transformers. A pruned model (Prune-LoRA) is written "
        "whole for transformers or as LoRA for PEFT, and peft_lightning.load_pruned(FOLDER) gives the ordinary model "
        "back; or as model.onnx for onnxruntime.",
    )
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint, a run's folder or an adapter folder")
    parser.add_argument("--format", required=True, help="adapterhub, peft, peft_lightning, transformers or onnx")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--backbone", help="folder or hub name of the backbone, if it is not where the file says")
    parser.add_argument(
        "--head",
        choices=("auto", "with", "without"),
        default="auto",
        help="whether the classification head goes along; auto: to AdapterHub if it was trained, to PEFT not, with a "
        "whole pruned model (transformers, onnx) always",
    )
    given = parser.parse_args(words)
    from peft_lightning.exchange import export_adapter

    head = {"auto": None, "with": True, "without": False}[given.head]
    export_adapter(given.ckpt_path, given.out, format=given.format, head=head, backbone=given.backbone)
    sys.stdout.write(f"wrote {given.out}\n")


def _import(words: list[str]) -> None:
    parser = ToolParser(
        prog="peft-lightning import",
        description="Read an adapter that AdapterHub's library or Hugging Face PEFT (LoRA) wrote, check it against the "
        "backbone, and write it as an adapter folder of our own, which load() reads.",
    )
    parser.add_argument("--from", required=True, dest="source", metavar="FOLDER", help="holds adapter_config.json")
    parser.add_argument("--task", required=True, help="name of a row of the task table")
    parser.add_argument("--backbone", required=True, help="folder or hub name of the model the adapter was made for")
    parser.add_argument("--tokenizer", help="folder or hub name, if it is not the backbone's own")
    parser.add_argument("--dtype", default="float32", help="what the backbone is held in: float32 or bfloat16")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--allow_bin", action="store_true", help="read pickled tensors (.bin), and nothing but tensors")
    parser.add_argument("--new_head", action="store_true", help="pass over the folder's head and begin with a new one")
    given = parser.parse_args(words)
    from peft_lightning.exchange import export_adapter, import_adapter

    module = import_adapter(
        given.source,
        task=given.task,
        backbone={"name": given.backbone, "tokenizer": given.tokenizer, "dtype": given.dtype},
        allow_bin=given.allow_bin,
        new_head=given.new_head,
    )
    export_adapter(module, given.out, format="peft_lightning")
    sys.stdout.write(f"wrote {given.out}\n")
