"""Where raw rows come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from peft_lightning.data.source import open_source
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.table import Task, get_task

TASK = Task(name="mine", labels=("bad", "good"))
ROWS = [
    {"text": "the cat", "label": 1},
    {"text": 'a "quoted", text', "label": 0},
    {"text": "NA", "label": 1},
    {"text": "Zürich", "label": 0},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write ``rows`` in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    elif path.suffix == ".tsv":
        lines = ["\t".join(table.column_names), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def read(task: Task = TASK, stage: str = "train", rows: Any = None, root: Path | None = None) -> list[Any]:
    """All rows of a stage, two at a time."""
    source = open_source(task, stage, rows, None if root is None else str(root))
    parts = list(source.slices((*task.text, task.label), 2))
    return [dict(zip(part, row, strict=True)) for part in parts for row in zip(*part.values(), strict=True)]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("folder", ["mine", ""])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, folder: str) -> None:
    write(tmp_path / folder / f"train.{suffix}", ROWS)
    # A label is text in a file of text, so that a class may be called 1 or true.
    expected = [{**row, "label": str(row["label"])} for row in ROWS] if suffix in ("csv", "tsv") else ROWS
    assert read(root=tmp_path) == expected


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    write(tmp_path / "lines.jsonl", ROWS).rename(tmp_path / "train.json")
    assert read(root=tmp_path) == ROWS


def test_csv_may_hold_line_ends_and_texts_that_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,label\n"two\nlines",1\n"12",0\n')
    assert [row["text"] for row in read(root=tmp_path)] == ["two\nlines", "12"]
    (tmp_path / "train.csv").write_text("text,label\n12,1\n007,0\n")
    assert [row["text"] for row in read(root=tmp_path)] == ["12", "007"]


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    for pair in ("\\ud83d\\ude00", "\\\\ud83d"):  # a whole one, and the escape itself as a text
        (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "' + pair + '", "label": 1}\n')
        assert len(read(root=tmp_path)) == 2
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "\\ud83d", "label": 1}\n')
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read: row 1 has half of a character"):
        read(root=tmp_path)


@pytest.mark.parametrize(
    ("fields", "header", "row", "read"),
    [
        ({"kind": "choice", "options": {"choices": ["a", "b"]}}, "text,a,b,label", "1,2,3.0,0", ["1", "2", "3.0", 0]),
        (
            {"kind": "grouped", "labels": ("no", "yes"), "options": {"group": ["of"], "joined": ["more"]}},
            "text,more,of,label",
            "1,true,7,yes",
            ["1", "true", 7, "yes"],
        ),
        (
            {"kind": "marked", "labels": ("0", "1"), "options": {"words": {"text": ["at", "word"]}}},
            "text,at,word,label",
            "12,0,12,1",
            ["12", 0, "12", "1"],
        ),
        ({"kind": "generate"}, "text,label", "007,42", ["007", "42"]),
        (
            {"kind": "choice", "options": {"choices": ["a", "b"], "names": ["1", "2"]}},
            "text,a,b,label",
            "1,2,3,1",
            ["1", "2", "3", "1"],
        ),
    ],
)
def test_texts_of_every_kind_may_look_like_numbers(
    tmp_path: Path, fields: dict[str, Any], header: str, row: str, read: list[Any]
) -> None:
    (tmp_path / "train.csv").write_text(f"{header}\n{row}\n")
    task = Task(metrics=("f1a",) if fields["kind"] == "grouped" else ("accuracy",), **fields)
    (found,) = open_source(task, "train", None, str(tmp_path)).slices(tuple(header.split(",")), 10)
    assert [values for (values,) in found.values()] == read


def test_python_rows() -> None:
    assert read(rows={"train": ROWS}) == ROWS
    data = datasets.Dataset.from_list(ROWS)
    assert read(rows={"train": data}) == ROWS
    assert read(rows={"train": data.select([3, 1])}) == [ROWS[3], ROWS[1]]


def test_python_rows_may_name_the_stage() -> None:
    task = get_task("sst2")
    rows = {"validation": [{"sentence": "a", "label": 0}], "test": [{"sentence": "b", "label": 1}]}
    assert read(task, "test", rows) == rows["test"]
    assert read(task, "test", {"validation": rows["validation"]}) == rows["validation"]


def test_digest_follows_the_rows(tmp_path: Path) -> None:
    changed = [*ROWS[:3], {"text": "Basel", "label": 0}]

    def digests(rows: list[dict[str, Any]]) -> list[str]:
        write(tmp_path / "train.parquet", rows)
        python = [rows, datasets.Dataset.from_list(rows)]
        sources = [open_source(TASK, "train", {"train": given}, None) for given in python]
        return [source.digest for source in (*sources, open_source(TASK, "train", None, str(tmp_path)))]

    assert digests(ROWS) == digests(ROWS)
    assert not set(digests(ROWS)) & set(digests(changed))


def test_toy_tasks_need_no_files() -> None:
    assert read(get_task("toy_sentiment"), "validation") == toy_rows("toy_sentiment", "validation")


def test_hub_is_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*path: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, split, revision))
        return datasets.Dataset.from_list([{"sentence": "a", "label": 0}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(get_task("sst2"), "test") == [{"sentence": "a", "label": 0}]
    fixed = Task(text=("sentence",), labels=("a", "b"), hub=("owner/name@refs/convert/parquet",))
    assert read(fixed, "train") == [{"sentence": "a", "label": 0}]
    assert asked == [
        (("nyu-mll/glue", "sst2"), "validation", None),
        (("owner/name",), "train", "refs/convert/parquet"),
    ]


def test_hub_without_network_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"hub data set nyu-mll/glue/sst2, split train: cannot be loaded: .*root"):
        read(get_task("sst2"))


# -- what is refused


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"root is '.*nowhere'; allowed: a folder that exists; --data.root names another one"
    ):
        read(root=tmp_path / "nowhere")


def test_missing_task_folder_lists_the_folders(tmp_path: Path) -> None:
    write(tmp_path / "other" / "train.csv", ROWS)
    with pytest.raises(UsageError, match=r"neither a folder 'mine' nor files of its own \(.*\); folders there: other"):
        read(root=tmp_path)


def test_missing_split_lists_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "train.csv", ROWS)
    write(tmp_path / "mine" / "dev.csv", ROWS)
    with pytest.raises(DataError, match=r"mine: has no split 'test' \(stage predict\); there are: dev, train"):
        read(stage="predict", root=tmp_path)


def test_split_in_two_files(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.parquet", ROWS)
    with pytest.raises(DataError, match=r"several files of split 'train': train.csv, train.parquet; allowed: one"):
        read(root=tmp_path)


def test_missing_column_lists_the_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [{"words": "a", "label": 0}])
    with pytest.raises(DataError, match=r"train.csv: has no column 'text'; there are: words, label"):
        read(root=tmp_path)
    with pytest.raises(DataError, match=r"rows\['train'\]: has no column 'label'; there are: text"):
        read(rows={"train": [{"text": "a"}]})


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.json"])
def test_split_without_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text({".csv": "text,label\n", ".jsonl": "\n", ".json": "[]"}[Path(name).suffix])
    with pytest.raises(DataError, match=rf"{name}: has no rows; allowed: at least one"):
        read(root=tmp_path)
    with pytest.raises(DataError, match=r"rows\['train'\]: has no rows"):
        read(rows={"train": []})


@pytest.mark.parametrize("name", ["train.parquet", "train.csv", "train.jsonl", "train.json"])
def test_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": 1\n"')
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|has no)"):
        read(root=tmp_path)


def test_json_rows_that_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[1, 2]")
    with pytest.raises(DataError, match=r"train.json: cannot be read: not every row is an object"):
        read(root=tmp_path)


def test_python_rows_of_another_kind() -> None:
    with pytest.raises(DataError, match=r"rows has no split 'train' \(stage train\); there are: dev"):
        read(rows={"dev": ROWS})
    with pytest.raises(UsageError, match=r"rows\['train'\] is a str; allowed: a list of dicts, or a datasets.Data"):
        read(rows={"train": "text"})
    with pytest.raises(UsageError, match=r"rows\['train'\] is a list; allowed: a list of dicts"):
        read(rows={"train": ["text"]})


def test_task_without_any_source() -> None:
    with pytest.raises(UsageError, match="root is null; allowed for task 'mine': a folder, since it has no hub"):
        read()


def test_columns_by_other_names() -> None:
    """A column's own name comes first; ``a.b`` is an entry of mappings, and a column of that very name comes before."""
    rows = [
        {"answerKey": "B", "idx": {"question": 3}, "text": "a", "c.d": 5},
        {"answerKey": "C", "idx": {"question": 4}, "text": "b", "c.d": 6},
    ]
    also = {"label": "answerKey", "group": "idx.question", "text": "elsewhere", "flat": "c.d"}
    for given in (rows, datasets.Dataset.from_list(rows)):
        source = open_source(Task(name="mine"), "train", {"train": given}, None)
        parts = list(source.slices(("label", "group", "text", "flat"), 1, also))
        assert parts == [
            {"label": ["B"], "group": [3], "text": ["a"], "flat": [5]},
            {"label": ["C"], "group": [4], "text": ["b"], "flat": [6]},
        ]
        with pytest.raises(DataError, match=r"has no column 'label'; there are: answerKey, idx, text, c.d"):
            next(source.slices(("label",), 1))
        with pytest.raises(DataError, match=r"row 0, column 'idx': \{'question': 3\} has no entry 'answer'"):
            next(source.slices(("group",), 2, {"group": "idx.answer"}))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_name_of_a_column_that_is_no_text(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"train{suffix}").write_bytes(b"a\xff\n1\n")
    with pytest.raises(DataError, match="cannot be read: .*utf-8"):
        next(open_source(Task(name="mine", labels=("x", "y")), "train", None, str(tmp_path)).slices(("a",), 1))
