"""The dense teacher's top logits, computed once and kept on disk.

    teacher_cache/
        shard-00000.safetensors   values.I float32 [P, 10] and tokens.I int32 [P, 10] of sample I
        teacher.json              format version, identity of model, data and precision, size and
                                  sha256 of every shard

`teacher.json` is written last, so a cache that was interrupted has none; its whole shards are
taken over, because each carries the identity in its header.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rtpurbo import families
from rtpurbo.adapt.checkpoint import write_tensors
from rtpurbo.adapt.loop import Loop
from rtpurbo.adapt.progress import Progress
from rtpurbo.adapt.samples import Samples
from rtpurbo.files import check_files, list_files, read_format, require, require_files, write_json
from rtpurbo.patching import dense

FORMAT_VERSION = 1
_FORMAT = "rtpurbo.teacher"
_KEYS = {"format", "version", "identity", "files"}
TOP = 10
_SHARD = 64
_ROWS = 512


class TeacherCache:
    """Top-10 logits of the dense model at the label positions of every sample.

    Args:
        identity: of model, data and precision; a cache with another one is refused.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], samples: int):
        self._directory = directory
        self._identity = identity
        self._samples = samples
        self._shards = -(-samples // _SHARD)

    def fill(self, model: Any, samples: Samples, loop: Loop) -> None:
        """Computes what is missing with the dense model, the processes sharing the shards.

        Raises:
            ValueError: the cache belongs to another model or data, or was damaged since.
        """
        manifest = self._directory / "teacher.json"
        if manifest.exists():
            self._check(read_format(manifest, _FORMAT, FORMAT_VERSION, _KEYS))
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        accelerator = loop.accelerator
        mine = range(accelerator.process_index, self._shards, accelerator.num_processes)
        missing = [shard for shard in mine if not self._usable(self._path(shard))]
        total = sum(len(self._members(shard)) for shard in missing)
        with Progress("teacher", total, 0, loop.shows_progress) as shown:
            steps = count(1)
            for shard in missing:
                self._write_shard(
                    model, samples, shard, loop, lambda: shown(next(steps), "samples")
                )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            paths = [self._path(shard) for shard in range(self._shards)]
            content = {
                "format": _FORMAT,
                "version": FORMAT_VERSION,
                "identity": self._identity,
                "files": list_files(self._directory, paths),
            }
            write_json(manifest, content)
        accelerator.wait_for_everyone()

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        """values float32 [P, 10] and tokens int64 [P, 10] of the label positions of a sample."""
        with safe_open(self._path(sample // _SHARD), framework="pt") as shard:
            values = shard.get_tensor(f"values.{sample}")
            return values, shard.get_tensor(f"tokens.{sample}").long()

    @torch.no_grad()
    def _write_shard(
        self,
        model: Any,
        samples: Samples,
        shard: int,
        loop: Loop,
        tick: Callable[[], None],
    ) -> None:
        tensors = {}
        head = model.get_output_embeddings()
        device = head.weight.device
        training = model.training
        model.eval()
        for i in self._members(shard):
            sample = samples[i]
            with dense(model), loop.autocast():
                hidden = families.decoder(model)(
                    input_ids=sample.tokens[None].to(device), use_cache=False
                ).last_hidden_state[0, label_rows(sample.tokens, sample.labels).to(device)]
                best = [head(rows).float().topk(TOP, dim=-1) for rows in hidden.split(_ROWS)]
            tensors[f"values.{i}"] = torch.cat([top.values for top in best])
            tensors[f"tokens.{i}"] = torch.cat([top.indices for top in best]).int()
            tick()
        model.train(training)
        write_tensors(self._path(shard), tensors, self._header())

    def _check(self, content: dict[str, Any]) -> None:
        where, remedy = "rtpurbo: teacher cache", f"delete {self._directory} to compute it again"
        found = require(content, "identity", dict, where)
        different = [key for key in self._identity if found.get(key) != self._identity[key]]
        if different:
            raise ValueError(
                f"rtpurbo: teacher cache {self._directory} was made with another "
                f"{' and '.join(different)}; give another teacher_cache, or delete it"
            )
        files = require_files(content, where)
        check_files(self._directory, files, where, remedy)
        wanted = {self._path(shard).name for shard in range(self._shards)}
        if files.keys() != wanted:
            raise ValueError(
                f"{where}: {self._directory} must list {self._shards} shards, got "
                f"{sorted(files)}; {remedy}"
            )

    def _usable(self, path: Path) -> bool:
        """Whether an interrupted call left this shard whole."""
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as shard:
                return shard.metadata() == self._header()
        except SafetensorError:
            return False

    def _header(self) -> dict[str, str]:
        return {key: str(value) for key, value in self._identity.items()}

    def _members(self, shard: int) -> range:
        return range(shard * _SHARD, min((shard + 1) * _SHARD, self._samples))

    def _path(self, shard: int) -> Path:
        return self._directory / f"shard-{shard:05d}.safetensors"


def label_rows(tokens: Tensor, labels: list[int] | None) -> Tensor:
    """Rows whose logits are compared: one before each label token.

    Without labels, the last three quarters of the sequence.
    """
    positions = range(max(1, len(tokens) // 4), len(tokens)) if labels is None else labels
    return torch.tensor([position - 1 for position in positions if position > 0])
