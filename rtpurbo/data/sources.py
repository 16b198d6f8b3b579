"""Prose that any machine has: documentation and docstrings of what is installed."""

import ast
import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

SOURCES = {
    "cpython": "PSF-2.0 (CPython's pydoc topics and the docstrings of its standard library)",
    "torch": "BSD-3-Clause (docstrings of the installed PyTorch)",
    "transformers": "Apache-2.0 (docstrings of the installed transformers)",
}
"""Where `prose` can read, and the licence of what it finds there."""

_MIN_CHARACTERS = 400
_HELD_OUT_ONE_IN = 5
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def prose(
    source: str | Sequence[str] = "cpython",
    *,
    split: Literal["train", "held_out"] = "train",
) -> list[str]:
    """Documentation prose of this machine, as documents in a fixed order.

    Args:
        source: a key of `SOURCES`, or several. "cpython" needs nothing but the interpreter.
        split: one document in five is "held_out", chosen by a hash of its name, so that no
            document is ever in both.

    Returns:
        Documents of at least 400 characters. A docstring that stands in several places is kept
        once, in its first place.

    Raises:
        ValueError: an unknown source or split, or a source that is not installed.
    """
    names = [source] if isinstance(source, str) else list(source)
    if split not in ("train", "held_out"):
        raise ValueError(f"rtpurbo.data.prose: split must be 'train' or 'held_out', got {split!r}")
    unknown = [name for name in names if name not in SOURCES]
    if unknown or not names:
        raise ValueError(
            f"rtpurbo.data.prose: source must be among {sorted(SOURCES)}, got {unknown or names}"
        )
    held_out = split == "held_out"
    return [
        text
        for name in names
        for title, text in _documents(name)
        if _is_held_out(title) == held_out
    ]


def _is_held_out(title: str) -> bool:
    digest = hashlib.sha256(title.encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


@functools.cache
def _documents(source: str) -> tuple[tuple[str, str], ...]:
    """(title, text) of every document of a source, sorted by title within its kind."""
    documents = list(_topics()) if source == "cpython" else []
    seen: set[str] = set()
    root = _root(source)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            text = "\n\n".join(_docstrings(path, seen))
            documents.append((f"{source}:{relative.as_posix()}", text))
    return tuple((title, text) for title, text in documents if len(text) >= _MIN_CHARACTERS)


def _root(source: str) -> Path:
    if source == "cpython":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(source)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"rtpurbo.data.prose: source {source!r} needs the package, not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _topics() -> Iterator[tuple[str, str]]:
    """The language reference that `help()` prints; some distributions ship without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topic:{name}", topics[name].strip()


def _docstrings(path: Path, seen: set[str]) -> Iterator[str]:
    """The docstrings of a module in source order, without those met before. Nothing is imported."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        pending.extend(reversed(list(ast.iter_child_nodes(node))))
        if not isinstance(node, documented):
            continue
        text = ast.get_docstring(node)
        if text and text not in seen:
            seen.add(text)
            yield text
