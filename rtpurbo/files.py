"""Files that appear whole or not at all, and the checks of what is read back."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any


def check_format(data: dict[str, Any], name: str, version: int, known: set[str]) -> None:
    """Refuses another format or a newer version of it; warns about unknown keys."""
    if not isinstance(data, dict) or data.get("format") != name:
        raise ValueError(f"{name}: this file is not a {name} (its `format` key says otherwise)")
    if not isinstance(data.get("version"), int) or data["version"] > version:
        raise ValueError(
            f"{name}: format version {data.get('version')} is newer than {version}, the newest "
            "that this rtpurbo reads; upgrade rtpurbo"
        )
    unknown = data.keys() - known
    if unknown:
        warnings.warn(f"{name}: unknown keys {sorted(unknown)} are ignored", stacklevel=3)


def read_json(path: Path) -> Any:
    """A JSON file; one that does not parse raises a ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"rtpurbo: {path} is not valid JSON ({error}); is it cut off?") from error


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, all or nothing."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, all or nothing."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
    ) as scratch:
        scratch.write(text)
    os.replace(scratch.name, path)


def digest_of(data: Any) -> str:
    """A short name for JSON data, the same before it is written and after it is read."""
    plain = json.loads(json.dumps(data))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
