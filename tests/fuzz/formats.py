"""Every format that the toolkit reads: a small example of each, and what reading it gives.

``READERS`` names the modules of the package that open files, each with the formats below that go through it, or with
the reason why none does; a test finds modules that are missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from peft_lightning import SparseAdapterModule, load, load_pruned
from peft_lightning.analysis.sentences import read_sentences
from peft_lightning.backbones.build import BackboneConfig, build_backbone, fingerprint
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.cli.yaml_files import read_yaml
from peft_lightning.data.documents import Corpus, Piece, open_corpus
from peft_lightning.data.encode import encode_split
from peft_lightning.data.pack import packed
from peft_lightning.data.source import open_source
from peft_lightning.data.vocabulary import read_vocabulary
from peft_lightning.data.wordpiece import trained_tokenizer
from peft_lightning.files.adapterhub import read_adapterhub
from peft_lightning.files.adapterhub_fusion import read_fusion
from peft_lightning.files.hf_peft import read_peft
from peft_lightning.files.importance import read_importance, write_importance
from peft_lightning.files.manifest import read_file
from peft_lightning.files.sources import read_source
from peft_lightning.layers.importance import Importance
from peft_lightning.study.grid import read_grid
from peft_lightning.study.records import read_record
from peft_lightning.study.results import StudyFolder, read_study, write_json
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import get_task
from tests.pruned import four_heads, pruned
from tests.sources import backbone_folder, module, written
from tests.toy import build, data, trainer

Reader = Callable[[Path], Any]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        make: writes an example into a folder that is there.
        read: what the toolkit makes of the folder.
        trust: ours (what is read is what was written, to the last bit), rebuilt (the same, made again where it is
            damaged), foreign (names, shapes and dtypes are those that were written, and numbers finite), or free (a
            person writes it: any value that is allowed may be read).
        files: names of the files to break; all by default.
        optional: a folder without the files is another one, and not broken.
        weight: how often it is broken, beside others.
    """

    make: Callable[[Path], object]
    read: Reader
    trust: str = "foreign"
    files: tuple[str, ...] = ()
    weight: int = 1
    optional: bool = False


# -- examples


@lru_cache
def _backbone(place: Path) -> str:
    return backbone_folder(place / "backbone")


def _kept(folder: Path) -> Path:
    """A folder beside, that is not broken."""
    return folder.parent.parent / "kept"


def _adapter(folder: Path, format: str, **options: Any) -> None:
    given = module(_backbone(_kept(folder)), 0, **options)
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written(folder, given, format)


def _pickled(folder: Path, names: dict[str, str], zipped: bool = True) -> None:
    from safetensors.torch import load_file

    for safe, binary in names.items():
        torch.save(load_file(folder / safe), folder / binary, _use_new_zipfile_serialization=zipped)
        (folder / safe).unlink()


def _hub_bin(folder: Path) -> None:
    _adapter(folder, "adapterhub")
    _pickled(folder, {"adapter.safetensors": "pytorch_adapter.bin"})
    for path in folder.glob("*head*"):
        path.unlink()


def _peft_bin(folder: Path) -> None:
    _adapter(folder, "peft", kind="lora", target=None)
    _pickled(folder, {"adapter_model.safetensors": "adapter_model.bin"}, zipped=False)


def _run(folder: Path) -> None:
    made = build(SparseAdapterModule)
    trainer(folder, 1, max_steps=1, limit_val_batches=1).fit(made, datamodule=data())


def _fusion(folder: Path) -> None:
    site = "encoder.layer.0.output.adapter_fusion_layer.one,two"
    tensors = {f"{site}.{part}.weight": torch.randn(4, 4) for part in ("query", "key", "value")}
    tensors |= {f"{site}.{part}.bias": torch.randn(4) for part in ("query", "key")}
    section = {"key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True}
    section |= {"residual_before": False, "temperature": False, "value_before_softmax": True}
    config = {"adapter_names": ["one", "two"], "config": section, "hidden_size": 4, "model_type": "bert"}
    (folder / "adapter_fusion_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model_adapter_fusion.safetensors")


_MEASURED_ON = {"model_type": "bert", "weights": "abc"}


def _importance(folder: Path) -> None:
    measured = Importance(
        heads={"a": torch.rand(4, dtype=torch.float64)}, neurons={}, blocks={"a": 0.5}, examples=8, tokens=80
    )
    write_importance(folder / "importance.json", measured, _MEASURED_ON, {"task": "mine"})


def _pruned_model(folder: Path, format: str) -> None:
    whole = _kept(folder) / "whole"
    if not whole.exists():
        build_backbone(BackboneConfig(**four_heads("bert"))).save_pretrained(whole)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft_lightning.exchange import export_adapter

        shutil.rmtree(folder)
        export_adapter(pruned(str(whole)), folder, format=format)


def _study(folder: Path) -> None:
    record: dict[str, Any] = {
        "metric": "accuracy",
        "dev": {"accuracy": 0.5},
        "test": {"accuracy": 0.25},
        "predictions": [0, 1],
    }
    record |= {"truths": [0, 0], "steps": 3, "trained_parameters": 12}
    cells = [[f"{number:020x}", {"method": "a", "seed": number}] for number in range(2)]
    for digest, _ in cells:
        StudyFolder(folder).write(str(digest), record)
    write_json(folder / "study.json", {"cells": cells, "majority": {"mine": {"accuracy": 0.5}}})
    for path in (folder / "cells").iterdir():
        path.rename(folder / path.name)


def _read_study(folder: Path) -> Any:
    (folder / "cells").mkdir(exist_ok=True)
    for path in folder.glob("0*.json"):
        path.rename(folder / "cells" / path.name)
    found = read_study(folder)
    return {json.dumps(record["cell"], sort_keys=True): record for record in found}


_TEXTS = [f"the {word} dog is not good" for word in ("red", "big", "tiny", "lazy")] * 8


def _corpus() -> Corpus:
    return Corpus(name="mine", digest="mine", read=lambda: (Piece(*pair) for pair in enumerate(_TEXTS)))


def _blocks(folder: Path) -> Any:
    blocks = packed(_corpus(), read_vocabulary(load_tokenizer("toy")), 16, folder)
    return blocks.rows(np.arange(len(blocks)))


def _trained(folder: Path) -> Any:
    return trained_tokenizer(_corpus(), 300, folder).get_vocab()


_TASK = get_task({"name": "mine", "text": ["text"], "labels": ["no", "yes"]})
_ROWS: list[dict[str, Any]] = [{"text": text, "label": number % 2} for number, text in enumerate(_TEXTS[:12])]


def _encoded(folder: Path) -> Any:
    source = open_source(_TASK, "train", {"train": _ROWS}, None)
    options: Any = {"max_length": 16, "labelled": True, "references": False}
    found = encode_split(source, build_kind(_TASK), load_tokenizer("toy"), folder=folder, **options)
    return [found.scalars, found.ragged]


def _rows(folder: Path, ending: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table, path = pa.Table.from_pylist(_ROWS), folder / f"train{ending}"
    if ending == ".parquet":
        parquet.write_table(table, path, row_group_size=5)
    elif ending == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in _ROWS))
    elif ending == ".json":
        path.write_text(json.dumps(_ROWS))
    else:
        mark = "\t" if ending == ".tsv" else ","
        lines = [("text", "label"), *((str(row["text"]), str(row["label"])) for row in _ROWS)]
        path.write_text("".join(f"{mark.join(line)}\n" for line in lines))


def _read_rows(folder: Path) -> Any:
    source = open_source(_TASK, "train", None, str(folder))
    options: Any = {"max_length": 16, "labelled": True, "references": False}
    return len(encode_split(source, build_kind(_TASK), load_tokenizer("toy"), folder=folder / "cache", **options))


def _texts(folder: Path, ending: str) -> None:
    if ending == ".txt":
        (folder / "train.txt").write_text("\n\n".join(_TEXTS))
    else:
        _rows(folder, ending)


def _read_texts(folder: Path) -> Any:
    corpus = open_corpus(str(folder), "train")
    return None if corpus is None else sum(len(piece.text) for piece in corpus.read())


def _sentences(folder: Path) -> None:
    rows = [f"{split}\t{label}\tthe dog is {label}\n" for split in ("tr", "va", "te") for label in ("good", "bad")]
    (folder / "sentences.tsv").write_text("".join(rows))


def _record(folder: Path) -> None:
    shutil.copy(ROOT / "benchmarks/results/mrpc/full-seed0.json", folder / "x.json")


def _metrics(folder: Path) -> None:
    logger = MetricsCSV(folder)
    for step in range(5):
        logger.log_metrics({"loss": 0.5, "accuracy": 0.25}, step)


_TASK_ROWS = [
    {"name": "mine", "kind": "prompt", "text": ["text"], "labels": ["no", "yes"]}
    | {"options": {"template": "{0} That is {mask}.", "words": {"no": "bad", "yes": "good"}}},
    {"name": "mine", "kind": "span", "text": ["question", "context"], "label": "answers", "metrics": ["f1"]},
    {"name": "mine", "kind": "tags", "text": ["words"], "label": "tags", "labels": ["O", "B-P", "I-P"]},
]


def _task_rows(folder: Path) -> None:
    for number, row in enumerate(_TASK_ROWS):
        (folder / f"task{number}.yaml").write_text(yaml.safe_dump(row))


def _read_task_rows(folder: Path) -> Any:
    from peft_lightning.errors import UsageError

    found = []
    for path in sorted(folder.iterdir()):
        row = read_yaml(path)
        if not isinstance(row, dict):
            raise UsageError("task: must be a mapping")
        found.append(repr(build_kind(get_task(row)).task))
    return found


def _run_config(folder: Path) -> Any:
    """What the command line makes of the configuration, before anything is built."""
    import contextlib
    import io
    import sys

    from peft_lightning.cli.main import main
    from peft_lightning.errors import UsageError

    output, errors = io.StringIO(), io.StringIO()
    kept, sys.argv = sys.argv, ["peft-lightning"]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main(["fit", "--config", str(folder / "config.yaml"), "--print_config"])
    except SystemExit as done:
        if done.code:
            lines = errors.getvalue().strip().splitlines()
            assert len(lines) == 1 and "--debug" not in lines[0], errors.getvalue()
            raise UsageError(lines[0]) from None
    finally:
        sys.argv = kept
    return output.getvalue()


def _config(folder: Path) -> None:
    files = [ROOT / "configs" / name for name in ("sparse_adapter.yaml", "overlays/toy.yaml", "overlays/cpu.yaml")]
    content: dict[str, Any] = {}
    for file in files:
        for section, values in yaml.safe_load(file.read_text()).items():
            into = content.setdefault(section, {})
            for name, value in values.items():
                into[name] = {**into[name], **value} if isinstance(into.get(name), dict) else value
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def _read_own(folder: Path) -> Any:
    content = read_file(folder)
    loaded = load(folder)
    return [content, dict(loaded.hparams), loaded.state_dict()]


def _read_pruned(folder: Path, base: bool = False) -> Any:
    found = load_pruned(folder, backbone=str(folder.parent / "kept" / "whole") if base else None)
    return [found.state_dict(), found.config.to_dict()]


def _read_backbone(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = build_backbone(BackboneConfig(name=str(folder), tokenizer="toy"))
    fingerprint(found)
    return found.state_dict()


def _backbone_bin(folder: Path) -> None:
    backbone_folder(folder)
    _pickled(folder, {"model.safetensors": "pytorch_model.bin"})


_MASKS = "peft_lightning_masks.safetensors"
_PRUNE = {"sparsity": 0.5, "score": "magnitude"}
FORMATS: dict[str, Format] = {
    "our adapter": Format(lambda f: _adapter(f, "peft_lightning", prune=_PRUNE), _read_own, "ours", weight=2),
    "checkpoint": Format(_run, lambda f: load(f).state_dict(), "ours", ("best.ckpt", "last.ckpt")),
    "AdapterHub": Format(lambda f: _adapter(f, "adapterhub"), lambda f: read_adapterhub(f), weight=2),
    "masks": Format(partial(_adapter, format="adapterhub", prune=_PRUNE), read_adapterhub, "ours", (_MASKS,), 1, True),
    "AdapterHub, pickled": Format(_hub_bin, lambda f: read_adapterhub(f, allow_bin=True)),
    "AdapterHub, as a source": Format(lambda f: _adapter(f, "adapterhub"), lambda f: read_source(f)),
    "PEFT": Format(lambda f: _adapter(f, "peft", kind="lora", target=None), lambda f: read_peft(f), weight=2),
    "PEFT, pickled": Format(_peft_bin, lambda f: read_peft(f, allow_bin=True)),
    "fusion": Format(_fusion, lambda f: read_fusion(f)),
    "importance": Format(_importance, lambda f: read_importance(f / "importance.json", _MEASURED_ON, "mine"), "ours"),
    "pruned model": Format(lambda f: _pruned_model(f, "transformers"), _read_pruned, "ours"),
    "pruned model, LoRA": Format(
        lambda f: _pruned_model(f, "peft"), partial(_read_pruned, base=True), "ours", ("pruned.json",)
    ),
    "backbone": Format(lambda f: backbone_folder(f), _read_backbone, files=("config.json", "model.safetensors")),
    "backbone, pickled": Format(_backbone_bin, _read_backbone, files=("config.json", "pytorch_model.bin")),
    "tokenizer": Format(
        lambda f: backbone_folder(f),
        lambda f: len(load_tokenizer(str(f))("the dog is good")["input_ids"]),
        "free",
        ("tokenizer.json", "tokenizer_config.json"),
    ),
    "run's configuration": Format(_config, _run_config, "free", weight=2),
    "grid": Format(
        lambda f: shutil.copy(ROOT / "configs/study/toy.yaml", f / "grid.yaml"),
        lambda f: repr(read_grid(read_yaml(f / "grid.yaml"))),
        "free",
    ),
    "study": Format(_study, _read_study, "subset"),
    "record": Format(_record, lambda f: repr(read_record(f / "x.json")), "free"),
    "task rows": Format(_task_rows, _read_task_rows, "free"),
    "blocks": Format(_blocks, _blocks, "rebuilt"),
    "encoded rows": Format(_encoded, _encoded, "rebuilt"),
    "trained tokenizer": Format(_trained, _trained, "rebuilt"),
    "sentences": Format(_sentences, lambda f: repr(read_sentences(f / "sentences.tsv")), "free"),
    "metrics.csv": Format(_metrics, lambda f: MetricsCSV(f).read(), "free"),
}
for _ending in (".parquet", ".csv", ".tsv", ".jsonl", ".json"):
    FORMATS[f"rows{_ending}"] = Format(partial(_rows, ending=_ending), _read_rows, "free")
for _ending in (".parquet", ".txt", ".jsonl"):
    FORMATS[f"texts{_ending}"] = Format(partial(_texts, ending=_ending), _read_texts, "free")

# Modules that open files -> the formats that go through them, or why none has to.
READERS: dict[str, tuple[str, ...] | str] = {
    "atomic": "what it writes itself, and folders",
    "analysis.probe": "its own temporary files",
    "analysis.sentences": ("sentences",),
    "backbones.build": ("backbone", "backbone, pickled"),
    "backbones.folders": ("backbone", "backbone, pickled"),
    "backbones.options": ("pruned model",),
    "backbones.tokenizers": ("tokenizer", "checkpoint"),
    "callbacks.log": ("metrics.csv",),
    "cli.merge": "a user's list of texts, read as bytes of a bounded number",
    "cli.running": "an empty file, to lock it",
    "cli.resuming": ("run's configuration",),
    "files.checksum": ("checkpoint",),
    "cli.recorded": ("run's configuration",),
    "cli.study": ("grid",),
    "cli.trainer": ("run's configuration",),
    "cli.yaml_files": ("run's configuration", "grid", "task rows"),
    "data.cache": ("encoded rows",),
    "data.documents": ("texts.txt",),
    "data.encode": "the package's own source",
    "data.lock": "an empty file",
    "data.offline": "texts that come with Python, parsed and not run",
    "data.pack": ("blocks",),
    "data.readers": ("texts.parquet", "texts.txt", "texts.jsonl"),
    "data.source": ("rows.parquet", "rows.csv", "rows.tsv", "rows.jsonl", "rows.json"),
    "data.vocabulary": ("trained tokenizer", "tokenizer"),
    "data.wordpiece": ("trained tokenizer",),
    "exchange.base": ("backbone",),
    "exchange.pruned": ("pruned model",),
    "files.adapterhub": ("AdapterHub", "AdapterHub, pickled"),
    "files.adapterhub_fusion": ("fusion",),
    "files.adapterhub_head": ("AdapterHub",),
    "files.foreign": ("AdapterHub", "PEFT", "masks"),
    "files.hf_peft": ("PEFT", "PEFT, pickled"),
    "files.importance": ("importance",),
    "files.manifest": ("our adapter", "checkpoint"),
    "files.packed": ("our adapter", "masks"),
    "files.pruned": ("pruned model", "pruned model, LoRA"),
    "files.sources": ("AdapterHub, as a source",),
    "layers.language_head": "one entry of a backbone's file that is loaded already",
    "reading.json_text": ("our adapter", "rows.jsonl", "tokenizer"),
    "reading.limits": ("our adapter", "PEFT", "pruned model"),
    "reading.opcodes": ("checkpoint", "AdapterHub, pickled", "PEFT, pickled"),
    "reading.pickled": ("checkpoint", "AdapterHub, pickled", "PEFT, pickled"),
    "reading.seal": "the text of values that it has just written out",
    "reading.tables": ("rows.parquet", "texts.parquet"),
    "study.identity": "digests of files as bytes",
    "study.memory": "what the system says of this process",
    "study.records": ("record",),
    "study.results": ("study",),
    "study.tables": "a Markdown file of this repository",
    "tasks.batch": "references that this package has encoded, out of the checked cache",
}


# -- comparing


def figure(value: Any) -> Any:
    """A value as nested plain values that can be compared, tensors by their bytes."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach().contiguous()
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        finite = bool(tensor.isfinite().all()) if tensor.is_floating_point() else True
        return {"tensor": [str(tensor.dtype), list(tensor.shape)], "digest": digest, "finite": finite}
    if isinstance(value, dict):
        return {str(name): figure(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [figure(entry) for entry in value]
    return value if isinstance(value, int | float | str | None) else repr(value)


def outline(value: Any) -> Any:
    """Of a figure only the names, dtypes and shapes of its tensors, and whether their numbers are finite."""
    if isinstance(value, dict) and "digest" in value:
        return [value["tensor"], value["finite"]]
    if isinstance(value, dict):
        found = {name: outline(entry) for name, entry in value.items()}
        return {name: entry for name, entry in found.items() if entry not in (None, {}, [])}
    if isinstance(value, list):
        return [found for entry in value if (found := outline(entry)) not in (None, {}, [])]
    return None


def difference(trust: str, before: Any, after: Any) -> str | None:
    """Why what was read of a broken file must not pass for what was written."""
    if trust in ("ours", "rebuilt") and after != before:
        return "is read as something else"
    if trust == "foreign" and outline(after) != outline(before):
        return "is read with other names, shapes, dtypes, or numbers that are not finite"
    if trust == "subset" and not all(name in before and before[name] == entry for name, entry in after.items()):
        return "is read with a cell that is another"
    return None
