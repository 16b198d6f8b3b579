"""Whether results can be written, asked before a command works for hours on them."""

from __future__ import annotations

import os
from pathlib import Path


def check_file(path: Path) -> None:
    """Makes the folder of a file to be written; refuses a place that cannot be written to."""
    if path.is_dir():
        raise IsADirectoryError(f"rtpurbo: {path} must be a file to write, but is a folder")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Makes a folder to write into; refuses one that cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            f"rtpurbo: {path} must be a folder to write into, but is a file"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"rtpurbo: {path} must be a folder that you may write into")
