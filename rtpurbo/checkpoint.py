"""Saving and loading sparse models.

    PATH/
        config.json, model*.safetensors, tokenizer files   as transformers writes them
        rtpurbo_index.safetensors    layers.L.w_q, .w_k, .offset, .threshold; a digest of the
                                     configuration
        rtpurbo.json                 format version, identity, configuration, size and sha256 of
                                     every other file

`AutoModelForCausalLM.from_pretrained(PATH)` gives the dense model with the same weights.
"""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rtpurbo import families
from rtpurbo.config import RTPurboConfig
from rtpurbo.context import state
from rtpurbo.files import (
    check_files,
    digest_of,
    list_files,
    read_format,
    require,
    require_files,
    write_json,
)
from rtpurbo.index import Index
from rtpurbo.patching import sparsify

FORMAT_VERSION = 2
"""1 had thresholds of sparse prefill for blocks ranked by exp-sum; see `_check_thresholds`."""
MANIFEST = "rtpurbo.json"
INDEX_FILE = "rtpurbo_index.safetensors"
_FORMAT = "rtpurbo.checkpoint"
_CONFIG_DIGEST = "config_digest"
_KEYS = {"format", "version", "base_model", "config", "index", "files"}


def save_pretrained(model: Any, path: str | Path, tokenizer: Any = None) -> None:
    """Writes a sparse model: weights, tokenizer, configuration, head map and index.

    The folder appears whole or not at all; one that `save_pretrained` wrote before is replaced,
    unless other files have come into it since.

    Args:
        model: a sparse model. A PEFT adapter must be merged first.
        path: the folder to write.
        tokenizer: default: the one where the model was loaded from, if there is one.

    Raises:
        ValueError: the model is not sparse, or carries an unmerged adapter.
        FileExistsError: path is taken (see `check_destination`).
    """
    found, target = state(model), Path(path).resolve()
    if model is not families.unwrap(model):
        raise ValueError(
            "rtpurbo.save_pretrained: model carries a PEFT adapter; pass the result of "
            "model.merge_and_unload()"
        )
    check_destination(target)
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        tensors = {
            f"layers.{number}.{name}": tensor.detach().cpu().contiguous()
            for number, layer in found.index.layers.items()
            for name, tensor in layer.tensors().items()
        }
        digest = digest_of(found.config.to_dict())
        save_file(tensors, scratch / INDEX_FILE, {_CONFIG_DIGEST: digest})
        _write_manifest(scratch, found)
        _swap(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_destination(path: str | Path) -> None:
    """Checks that `save_pretrained` can write there, e.g. before a long training.

    A path is free where nothing is, or an empty folder, or one that holds what `save_pretrained`
    wrote and nothing else.

    Raises:
        FileExistsError: path is taken.
    """
    target = Path(path)
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(
            f"rtpurbo.save_pretrained: {target} must be a folder or new, but is a file; choose a "
            "new path"
        )
    others = sorted(_entries(target) - _written(target))
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise FileExistsError(
            f"rtpurbo.save_pretrained: {target} holds files that would be deleted with it "
            f"({shown}); choose a new path, or move them away"
        )


def from_pretrained(path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """Loads what `save_pretrained` wrote.

    Args:
        path: the folder.
        kwargs: for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, ...), which reads
            safetensors only.

    Returns:
        (model, tokenizer): the model sparse, in eval mode; tokenizer None if none was saved.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is missing, cut off, changed or not listed in rtpurbo.json, the format is
            newer, the thresholds of a sparse prefill are older, or the index is not this model's.
            README.md and hidden files need no listing.
    """
    folder = Path(path)
    if kwargs.pop("use_safetensors", True) is not True:
        raise ValueError(
            "rtpurbo.from_pretrained: use_safetensors must be True or left out; other formats can "
            "run code"
        )
    manifest = read_manifest(folder)
    _verify(folder, manifest["files"])
    _check_digest(folder, manifest["config"])
    config = RTPurboConfig.from_dict(manifest["config"])
    _check_thresholds(folder, manifest, config)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **kwargs)
    identity = families.identity(model)
    if not families.same_model(identity, manifest["base_model"]["identity"]):
        raise ValueError(
            f"rtpurbo.from_pretrained: {folder} holds an index for "
            f"{manifest['base_model']['identity']} but the weights of {identity}"
        )
    sparsify(model, config)
    _load_index(state(model).index, folder, manifest["index"])
    saved = "tokenizer_config.json" in manifest["files"]
    return model.eval(), AutoTokenizer.from_pretrained(folder) if saved else None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What rtpurbo.json says of a folder that `save_pretrained` wrote; its files are not looked at.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is cut off, lacks something, or its format is newer.
    """
    place = Path(folder) / MANIFEST
    if not place.is_file():
        raise FileNotFoundError(
            f"rtpurbo: {folder} holds no {MANIFEST}; it must be a folder that "
            "rtpurbo.save_pretrained wrote"
        )
    manifest = read_format(place, _FORMAT, FORMAT_VERSION, _KEYS)
    where = f"rtpurbo: {place}"
    require(require(manifest, "base_model", dict, where), "identity", str, f"{where}: base_model")
    require(manifest, "config", dict, where)
    index = require(manifest, "index", dict, where)
    require(index, "trained", bool, f"{where}: index")
    require(index, "history", dict, f"{where}: index")
    require_files(manifest, where)
    return manifest


def _written(folder: Path) -> set[str]:
    """What `save_pretrained` wrote there, by the manifest."""
    try:
        return _with_parents([MANIFEST, *read_manifest(folder)["files"]])
    except (OSError, ValueError):
        return set()


def _entries(folder: Path) -> set[str]:
    """Everything in a folder, at any depth, by its name relative to it."""
    return {entry.relative_to(folder).as_posix() for entry in folder.rglob("*")}


def _with_parents(names: list[str]) -> set[str]:
    """Names of files, and those of the folders they lie in."""
    return {place.as_posix() for name in names for place in (Path(name), *Path(name).parents[:-1])}


def _tokenizer_of(model: Any) -> Any:
    source = model.config.name_or_path
    try:
        return AutoTokenizer.from_pretrained(source) if source else None
    except (OSError, ValueError):
        warnings.warn(
            f"rtpurbo.save_pretrained: no tokenizer found at {source}, none is saved; pass "
            "tokenizer=",
            stacklevel=3,
        )
        return None


def _write_manifest(folder: Path, found: Any) -> None:
    files = list_files(folder, (file for file in folder.rglob("*") if file.is_file()))
    write_json(
        folder / MANIFEST,
        {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "base_model": {"identity": found.identity},
            "config": found.config.to_dict(),
            "index": {"trained": found.index.trained, "history": found.index.history},
            "files": files,
        },
    )


def _swap(scratch: Path, target: Path) -> None:
    """Puts the new folder in place of the old one, if nothing came into that meanwhile."""
    check_destination(target)
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    if target.exists():
        os.rename(target, old)
    os.rename(scratch, target)
    shutil.rmtree(old, ignore_errors=True)


def _verify(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    where = "rtpurbo.from_pretrained"
    check_files(folder, files, where, "take the saved one back, or save the model again")
    weights = [name for name in files if name.startswith("model") and name.endswith(".safetensors")]
    if INDEX_FILE not in files or not weights:
        raise ValueError(
            f"rtpurbo.from_pretrained: {MANIFEST} must list {INDEX_FILE} and weights, "
            f"model*.safetensors; it lists {sorted(files)}"
        )
    unlisted = sorted(
        name
        for name in _entries(folder) - _with_parents([MANIFEST, "README.md", *files])
        if not name.startswith(".")
    )
    if unlisted:
        raise ValueError(
            f"rtpurbo.from_pretrained: {folder} holds {unlisted}, which {MANIFEST} does not list "
            "and which could change the model; move them away"
        )


def _check_digest(folder: Path, config: dict[str, Any]) -> None:
    with safe_open(folder / INDEX_FILE, framework="pt") as file:
        saved = (file.metadata() or {}).get(_CONFIG_DIGEST)
    if saved != digest_of(config):
        raise ValueError(
            f"rtpurbo.from_pretrained: config or its heads in {folder / MANIFEST} were changed "
            "after they were saved, and the index was made for those; take the saved ones back"
        )


def _check_thresholds(folder: Path, manifest: dict[str, Any], config: RTPurboConfig) -> None:
    """Since version 2 blocks weigh otherwise, which thresholds of a sparse prefill depend on."""
    old = manifest["version"] < 2
    if old and config.prefill == "sparse" and manifest["index"]["trained"]:
        raise ValueError(
            f"rtpurbo.from_pretrained: {folder} has format version {manifest['version']}, whose "
            "thresholds of the sparse prefill were calibrated for another ranking of blocks; make "
            "the dense model in it sparse and run rtpurbo.train_index again, which calibrates them"
        )


def _load_index(index: Index, folder: Path, about: dict[str, Any]) -> None:
    tensors = load_file(folder / INDEX_FILE)
    wanted = {f"layers.{n}.{name}" for n, layer in index.layers.items() for name in layer.tensors()}
    if tensors.keys() != wanted:
        raise ValueError(
            f"rtpurbo.from_pretrained: {INDEX_FILE} does not fit the head map; it lacks "
            f"{sorted(wanted - tensors.keys())} and has {sorted(tensors.keys() - wanted)}"
        )
    for number, layer in index.layers.items():
        for name, tensor in layer.tensors().items():
            saved = tensors[f"layers.{number}.{name}"]
            if saved.shape != tensor.shape:
                raise ValueError(
                    f"rtpurbo.from_pretrained: {name} of layer {number} must have shape "
                    f"{list(tensor.shape)}, got {list(saved.shape)}"
                )
            with torch.no_grad():
                tensor.copy_(saved)
    index.trained = about["trained"]
    index.history = about["history"]
