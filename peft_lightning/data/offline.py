"""The corpus that every Python brings: the language reference, and the docstrings of the standard library.

English prose with some code, found without a network. The docstrings are read by syntax tree; nothing is run.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_FORMAT = 1
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@lru_cache(maxsize=1)
def offline_documents() -> tuple[str, ...]:
    """Return a document per topic of the language reference, then one per module that has docstrings."""
    topics, modules = _sources()
    return (*topics, *filter(None, map(_docstrings, modules)))


@lru_cache(maxsize=1)
def offline_digest() -> str:
    """Return a digest that changes when the documents do: over the topics and the modules' files."""
    digest = hashlib.sha256(f"python {_FORMAT}".encode())
    topics, modules = _sources()
    for topic in topics:
        digest.update(topic.encode())
    for path in modules:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources() -> tuple[list[str], list[Path]]:
    from pydoc_data import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not _WITHOUT & {*path.relative_to(root).parts}]
    return [text for _, text in sorted(topics.topics.items()) if text.strip()], paths


def _docstrings(path: Path) -> str:
    """Return the docstrings of a module, a line apart; none for a file that is no Python of this version."""
    try:
        with warnings.catch_warnings():
            # Of other people's escapes.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    return "\n".join(_texts(tree))


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
