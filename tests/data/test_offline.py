"""The texts that ship with Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_lightning.data import offline
from peft_lightning.data.offline import offline_digest, offline_documents


def test_it_is_english_in_quantity() -> None:
    documents = offline_documents()
    words = [word for text in documents for word in text.split()]
    # Versions of Python differ a little.
    assert 250_000 < len(words) < 500_000
    assert len(documents) > 500
    assert all(text.strip() for text in documents)
    assert 0.03 < words.count("the") / len(words) < 0.08


def test_docstrings_of_all_that_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data import topics

    lib = tmp_path / "lib"
    for folder in ("package", "package/test", "site-packages", "test"):
        (lib / folder).mkdir(parents=True)
        (lib / folder / "hidden.py").write_text('"""Folder."""')
    (lib / "package" / "a.py").write_text(
        '"""Module.\n\n    More.\n"""\nraise SystemExit\nclass A:\n    """Class."""\n'
        '    async def f(self):\n        """Method."""\n    x = "no docstring"\n"\\d"\n'
    )
    (lib / "none.py").write_text("x = 1\n")
    (lib / "old.py").write_text("print 'hello'\n")
    (lib / "bytes.py").write_bytes(b"\0\xff")
    monkeypatch.setattr(topics, "topics", {"b": "Second.", "a": "First.", "c": " \n"})
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(lib)})
    read, digest = offline_documents.__wrapped__, offline_digest.__wrapped__
    assert read() == ("First.", "Second.", "Module.\n\nMore.\nClass.\nMethod.", "Folder.")
    before = digest()
    assert digest() == before
    (lib / "none.py").write_text("x = 2\n")
    assert digest() != before


def test_it_is_the_same_in_every_process() -> None:
    script = f"from {offline.__name__} import *; import sys; sys.stdout.write(offline_digest())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == offline_digest()
