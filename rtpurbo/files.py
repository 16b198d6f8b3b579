"""Files that appear whole or not at all, and the checks of what is read back."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_JSON = {dict: "object", str: "string", int: "whole number", bool: "boolean"}


def require(data: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of a key in JSON that was read; ValueError if it is missing or of another kind."""
    value = data.get(key)
    if type(value) is not kind:
        raise ValueError(
            f"{where}: {key} must be a JSON {_JSON[kind]}, got {value!r:.60}; it is damaged"
        )
    return value


def check_format(data: dict[str, Any], name: str, version: int, known: set[str]) -> None:
    """Refuses another format, a newer version or none; warns about unknown keys."""
    if not isinstance(data, dict) or data.get("format") != name:
        raise ValueError(f"{name}: this file is not a {name} (its `format` key says otherwise)")
    found = require(data, "version", int, name)
    if found < 1:
        raise ValueError(f"{name}: version must be 1 to {version}, got {found}; it is damaged")
    if found > version:
        raise ValueError(
            f"{name}: format version {found} is newer than {version}, the newest that this "
            "rtpurbo reads; upgrade rtpurbo"
        )
    unknown = data.keys() - known
    if unknown:
        warnings.warn(f"{name}: unknown keys {sorted(unknown)} are ignored", stacklevel=3)


def read_format(path: Path, name: str, version: int, keys: set[str]) -> dict[str, Any]:
    """A JSON file of a format, which must have all of its keys."""
    data = read_json(path)
    check_format(data, name, version, keys)
    missing = keys - data.keys()
    if missing:
        raise ValueError(f"{name}: {path} lacks {sorted(missing)}; it is damaged")
    return data


def read_json(path: Path) -> Any:
    """A JSON file; one that does not parse raises a ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"rtpurbo: {path} is not valid JSON ({error}); it is cut off or was edited; delete it "
            "or bring back a whole one"
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, all or nothing."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, all or nothing. What is no file, such as /dev/stdout, is written to."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def digest_of(data: Any) -> str:
    """A short name for JSON data, the same before it is written and after it is read."""
    plain = json.loads(json.dumps(data))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def list_files(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of files, by their names relative to a folder; see `check_files`."""
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
        for file in sorted(files)
    }


def require_files(data: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The key `files` of JSON that was read, if it has the form of `list_files`."""
    files = require(data, "files", dict, where)
    for name in files:
        about = require(files, name, dict, f"{where}: files")
        require(about, "bytes", int, f"{where}: files: {name}")
        require(about, "sha256", str, f"{where}: files: {name}")
    return files


def check_files(folder: Path, files: dict[str, dict[str, Any]], where: str, remedy: str) -> None:
    """Raises ValueError unless the files are as `list_files` found them."""
    for name, expected in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{where}: files must lie in {folder}, got {name!r}; {remedy}")
        if not file.is_file():
            raise ValueError(f"{where}: the file {file} is missing; {remedy}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(
                f"{where}: {file} must have {expected['bytes']} bytes, got {size}: it is cut off "
                f"or not the one that was saved; {remedy}"
            )
        if sha256_of(file) != expected["sha256"]:
            raise ValueError(
                f"{where}: {file} was changed after it was saved (its sha256 differs); {remedy}"
            )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
