"""No value in a foreign configuration makes a reader fail in another way than by saying what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_lightning import SparseAdapterModule
from peft_lightning.errors import PeftLightningError
from peft_lightning.exchange import export_adapter
from peft_lightning.files.adapterhub import read_adapterhub
from peft_lightning.files.hf_peft import read_peft
from tests.toy import build

VALUES: list[Any] = [
    *(None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", "4", "(", [], [None], [1], [["q"]], ["("], {}),
    *({"a": 1}, {"default": 4}, {"(": 1}, [10**9]),
]
MORE: dict[str, list[tuple[str, ...]]] = {
    "adapterhub": [("type",), ("config", "inv_adapter"), ("config", "invertible_adapter"), ("config", "new")],
    "peft": [("exclude_modules",), ("layers_to_transform",), ("use_bdlora",), ("loftq_config",), ("new",)],
}


def places(content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (key,)
        if key == "config" and isinstance(value, dict):
            yield from ((key, inner) for inner in value)


@pytest.mark.parametrize(("format", "kind"), [("adapterhub", "houlsby"), ("adapterhub", "lora"), ("peft", "lora")])
def test_any_value_is_read_or_refused(format: str, kind: str, tmp_path: Path) -> None:
    module = build(SparseAdapterModule, adapter={"kind": kind, "bottleneck": 3}, prune={"sparsity": 0.0})
    export_adapter(module, tmp_path / "a", format=format, head=True)
    read: Any = read_peft if format == "peft" else read_adapterhub
    refused = 0
    for path in sorted((tmp_path / "a").glob("*.json")):
        whole = json.loads(path.read_text())
        for place in [*places(whole), *MORE[format]]:
            for value in VALUES:
                content = json.loads(json.dumps(whole))
                inner = content
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = value
                path.write_text(json.dumps(content))
                try:
                    read(tmp_path / "a")
                except PeftLightningError as error:
                    assert "\n" not in str(error)
                    refused += 1
        path.write_text(json.dumps(whole))
    read(tmp_path / "a")
    assert refused > 200
