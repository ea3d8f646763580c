"""The words of a command before the parser reads them: what a checkpoint records goes before the user's own options."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.cli.yaml_files import read_yaml
from peft_lightning.errors import UsageError
from peft_lightning.files.manifest import MANIFEST_KEY, read_file
from peft_lightning.loading import kind_of, method_class, refuse_new_code

__all__ = ["joined", "option", "refuse_linked", "with_recorded_settings", "with_texts"]

LINKED = ("task", "seed", "max_length")  # options of the model that follow others
# option that follows -> option that it follows
FOLLOWS = {
    "model.task": "data.task",
    "model.max_length": "data.max_length",
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "data.tokenizer": "model.backbone.tokenizer",
}


def with_recorded_settings(words: list[str], folder: Path) -> list[str]:
    """For a command on a checkpoint: put what the checkpoint records before the user's own options.

    Args:
        words: the command line, the command first.
        folder: where a file with the recorded settings may be written.
    """
    path = option(words, "--ckpt_path")
    if words[0] == "fit" or path is None:
        return words
    manifest = read_file(path)[MANIFEST_KEY]
    values = dict(manifest["hyper_parameters"])
    method_class(str(manifest["class"]))
    refuse_new_code(kind_of(values.get("task")), path)
    recorded_data = manifest.get("run_config", {}).get("data")
    if not recorded_data and "task" not in values and not any(word.startswith("--data") for word in words):
        raise UsageError(
            f"{words[0]}: {path} does not say what it was trained on; give --data.inputs, the texts to read"
        )
    supervised = {key: values[key] for key in ("task", "max_length") if key in values}
    data = recorded_data or {
        "class_path": "TaskDataModule" if supervised else "MLMDataModule",
        "init_args": supervised,
    }
    refuse_new_code(data["class_path"], path)
    refuse_new_code(kind_of(data["init_args"].get("task")), path)
    recorded = {
        "seed_everything": values["seed"],
        "model": {
            "class_path": manifest["class"],
            "init_args": {key: value for key, value in values.items() if key not in LINKED},
        },
        "data": data,
    }
    file = folder / "recorded.yaml"
    file.write_text(yaml.safe_dump(recorded))
    return [words[0], "--config", str(file), *words[1:]]


def option(words: list[str], name: str) -> str | None:
    """The value of a flag among words of a command line, as ``--name value`` or ``--name=value``; the last one."""
    for position, word in reversed([*enumerate(words)]):
        if word == name and position + 1 < len(words):
            return words[position + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def joined(words: list[str]) -> list[str]:
    """The words, with ``--model.backbone.name`` and ``--model.backbone.config`` in one option if one of them is null.

    The parser checks each option as it comes, and of a name and a configuration a backbone has one only. A backbone
    that is given by its name alone becomes a mapping where options inside of it follow: the parser would forget it.
    """
    words = _as_mappings(words)
    flags = {f"--model.{part}backbone.{key}": key for part in ("", "init_args.") for key in ("name", "config")}
    found: dict[str, str] = {}
    rest: list[str] = []
    place, position = 0, 0
    while position < len(words):
        flag, given, value = words[position].partition("=")
        position += 1
        if flag not in flags or (not given and position == len(words)):
            rest.append(words[position - 1])
            continue
        if not given:
            value, position = words[position], position + 1
        found[flags[flag]], place = value, len(rest)
    nulls = [key for key, value in found.items() if value in ("null", "~")]
    mapping = found.get("config", "null").strip().startswith(("{", "null", "~"))
    if not nulls or not mapping or found.keys() == {"config"}:
        return words
    if "name" not in nulls:
        found["name"] = json.dumps(found["name"])  # a path may have what YAML takes for something else
    both = ", ".join(f"{key}: {value}" for key, value in found.items())
    return [*rest[:place], f"--model.backbone={{{both}}}", *rest[place:]]


def _as_mappings(words: list[str]) -> list[str]:
    """The words, with ``--model.backbone NAME`` spelt out in full if an option inside of it comes after."""
    flags = ("--model.backbone", "--model.init_args.backbone")
    found, position = list(words), 0
    while position < len(found):
        flag, given, name = found[position].partition("=")
        end = position + (1 if given else 2)
        name = name if given else "".join(found[position + 1 : end])
        inside = any(word.startswith(tuple(f"{flag}." for flag in flags)) for word in found[end:])
        if flag in flags and inside and not name.startswith("{") and name not in ("null", "~", ""):
            found[position:end] = [f"{flag}={json.dumps(asdict(BackboneConfig(name=name)))}"]
        position += 1
    return found


def refuse_linked(words: list[str]) -> None:
    """Refuse options that follow others, given as flags or in YAML: the parser would drop them without a word.

    Raises:
        UsageError: names the option to give instead.
    """
    given = {word.partition("=")[0].removeprefix("--").replace(".init_args", "") for word in words if word[:2] == "--"}
    for name, following in zip(words, [*words[1:], ""], strict=True):
        file = following if name == "--config" else name.removeprefix("--config=") if "--config=" in name else ""
        if file and Path(file).exists():
            given |= _keys(_checked(file, read_yaml(file)))
    for name in sorted(given & FOLLOWS.keys()):
        raise UsageError(f"--{name}: follows --{FOLLOWS[name]}; give that one")


def with_texts(dumped: Any, given: Any) -> Any:
    """What the parser dumps of options, with their texts as they were given: it makes false of the label word "No".

    >>> with_texts({"words": {"a": False}, "seed": 1}, {"words": {"a": "No"}, "seed": 1})
    {'words': {'a': 'No'}, 'seed': 1}
    """
    if isinstance(dumped, dict) and isinstance(given, dict):
        if "init_args" in given and "init_args" not in dumped:  # a plain dataclass
            given = given["init_args"]
        return {name: with_texts(value, given.get(name)) for name, value in dumped.items()}
    if isinstance(dumped, list) and isinstance(given, list | tuple) and len(dumped) == len(given):
        return [with_texts(value, before) for value, before in zip(dumped, given, strict=True)]
    return given if isinstance(given, str) else dumped


def _checked(file: str, content: Any) -> Any:
    """The content of a configuration, whose sections are what they have to be.

    The parser would drop all that other files say of a section that is no mapping.

    Raises:
        UsageError: names the file and the section.
    """
    if not isinstance(content, dict):
        raise UsageError(f"config = {file}: must be a mapping of options; it is {_short(content)}")
    for name in ("trainer", "model", "data"):
        value = content.get(name, {})
        by_name = name != "trainer" and isinstance(value, str) and not Path(value).exists()
        if not isinstance(value, dict) and not by_name:
            raise UsageError(
                f"config = {file}: {name} must be a mapping of options, and left out where it has none; it is "
                f"{_short(value)}"
            )
        inside = value.get("init_args", {}) if isinstance(value, dict) else {}
        if not isinstance(inside, dict):
            raise UsageError(f"config = {file}: {name}.init_args must be a mapping of options; it is {_short(inside)}")
    return content


def _short(value: Any) -> str:
    return "empty" if value is None else repr(value)[:60]


def _keys(content: object) -> set[str]:
    keys: set[str] = set()
    for part in ("model", "data"):
        section = content.get(part) if isinstance(content, dict) else None
        if isinstance(section, dict):
            keys |= {f"{part}.{key}" for key in {**section, **(section.get("init_args") or {})}}
    return keys
