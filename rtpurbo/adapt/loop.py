"""The one training loop: accelerate, AdamW, progress, JSONL metrics, checkpoints, exact resume.

Which sample a process sees at a step follows from (seed, step, process) alone, and dropout from
torch's generator, which checkpoints keep. So a resumed run continues bit for bit on one machine.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rtpurbo.adapt import checkpoint as ckpt
from rtpurbo.adapt.progress import Progress


class Task(Protocol):
    """What the loop trains.

    `parameters` are the leaves to train, by name; `loss_name` is how the loss is called.
    `backward(step, sample, weight)` adds the gradients of weight * loss of one sample and returns
    figures to log, among them "loss" and "tokens", the tokens it ran the model on. `clip` limits
    the gradients and returns their norm before.
    """

    parameters: dict[str, Tensor]
    loss_name: str

    def backward(self, step: int, sample: int, weight: float) -> dict[str, float]: ...

    def clip(self) -> float: ...


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of a run.

    Attributes:
        warmup: steps that rise linearly to lr.
        batch_size: samples a step, all processes together.
        repeats: consecutive steps on the same samples.
    """

    steps: int
    lr: float
    warmup: int
    decay: Literal["cosine", "constant"]
    batch_size: int = 1
    repeats: int = 1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.warmup < 0:
            raise ValueError(
                "rtpurbo.adapt: steps and batch_size must be >= 1 and warmup >= 0, got "
                f"steps={self.steps}, batch_size={self.batch_size}, warmup={self.warmup}"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"rtpurbo.adapt: lr must be positive, got {self.lr}")

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.lr
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class TrainResult:
    """What a training run did.

    Attributes:
        steps: steps the parameters have behind them, those before a resume included.
        losses: the loss of each step of this call.
        tokens, seconds: read and spent by this call, all processes together.
        metrics: figures of the whole run; which ones is said by the function that returned it.
        resumed_from: the step this call went on from, or None.
        output_dir: where checkpoints and metrics.jsonl lie, or None.
    """

    steps: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    resumed_from: int | None = None
    output_dir: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "output_dir": str(self.output_dir) if self.output_dir else None}


class Loop:
    """Runs a task through a schedule.

    Args:
        name: shown in the progress bar and kept in checkpoints, e.g. "stage 1".
        device: where the model stands.
        output_dir: for checkpoints and metrics.jsonl; None writes nothing.
        identity: figures that a resumed run must share, e.g. a hash of the data.
        samples: number of samples.
    """

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        *,
        samples: int,
        device: torch.device,
        output_dir: str | Path | None,
        identity: dict[str, Any],
        seed: int,
        checkpoint_every: int,
        progress: bool,
        mixed_precision: Literal["no", "bf16"] = "no",
    ):
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError("rtpurbo: training needs `pip install rtpurbo[train]`") from error
        if mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"rtpurbo.adapt: mixed_precision must be 'no' or 'bf16', got {mixed_precision!r}"
            )
        if checkpoint_every < 1:
            raise ValueError(f"rtpurbo.adapt: checkpoint_every must be >= 1: {checkpoint_every}")
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        world = self.accelerator.num_processes
        if schedule.batch_size % world:
            raise ValueError(
                f"rtpurbo.adapt: batch_size {schedule.batch_size} must be a multiple of the number "
                f"of processes, {world}"
            )
        self._name = name
        self._schedule = schedule
        self._samples = samples
        self._device = device
        self._bf16 = mixed_precision == "bf16"
        self._seed = seed
        self._every = checkpoint_every
        self.shows_progress = progress and self.accelerator.is_main_process
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self._folder = None
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            whole = {"task": name, "seed": seed, **asdict(schedule), **identity}
            self._folder = ckpt.CheckpointFolder(
                self.output_dir, whole, self.accelerator.process_index, world
            )

    def autocast(self) -> torch.autocast:
        """The precision of forward passes; accelerate's own is fixed once for a process."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def latest(self) -> ckpt.Checkpoint | None:
        return self._folder.latest() if self._folder else None

    def run(self, task: Task, resume: ckpt.Checkpoint | None, extra: dict[str, Any]) -> TrainResult:
        """Trains from `resume` (or the start) to the last step. `extra` goes into checkpoints."""
        names = list(task.parameters)
        leaves = list(task.parameters.values())
        optimizer = torch.optim.AdamW(
            leaves,
            lr=self._schedule.lr,
            betas=self._schedule.betas,
            weight_decay=self._schedule.weight_decay,
        )
        first = 0
        if resume is not None:
            first = resume.step
            with torch.no_grad():
                for name, leaf in task.parameters.items():
                    leaf.copy_(resume.parameters[name])
            ckpt.load_optimizer_tensors(optimizer, names, resume.optimizer)

        result = TrainResult(
            steps=first,
            resumed_from=first if resume is not None else None,
            output_dir=self.output_dir,
        )
        began = time.perf_counter()
        total = self._schedule.steps
        progress = Progress(self._name, total, first, self.shows_progress)
        with self._own_randomness(resume), self._metrics_file(first) as log, progress:
            for step in range(first, total):
                figures = self._step(task, optimizer, leaves, step)
                result.steps = step + 1
                result.losses.append(figures["loss"])
                result.tokens += int(figures["tokens"])
                result.seconds = time.perf_counter() - began
                figures["tokens_per_second"] = result.tokens / result.seconds
                log({"step": step + 1, **figures})
                progress(
                    step + 1,
                    f"{task.loss_name} {figures['loss']:.4f}  "
                    f"{figures['tokens_per_second']:,.0f} tokens/s",
                )
                if result.steps % self._every == 0 or result.steps == total:
                    self._save(result.steps, task, optimizer, names, extra)
        return result

    def _step(
        self, task: Task, optimizer: torch.optim.Optimizer, leaves: list[Tensor], step: int
    ) -> dict[str, float]:
        rate = self._schedule.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        micro = self._schedule.batch_size // world
        batch = step // self._schedule.repeats
        totals: dict[str, float] = {}
        for i in range(micro):
            sample = self._sample(batch * self._schedule.batch_size + i * world + rank)
            for key, value in task.backward(step, sample, 1 / micro).items():
                part = value if key == "tokens" else value / micro
                totals[key] = totals.get(key, 0.0) + part
        if world > 1:
            totals = self._reduce(leaves, totals)
        norm = task.clip()
        if not math.isfinite(totals["loss"]) or not math.isfinite(norm):
            raise FloatingPointError(
                f"rtpurbo.adapt: {self._name} step {step + 1}: loss {totals['loss']}, gradient "
                f"norm {norm}; nothing was updated. Look for NaN in the weights, or lower lr"
            )
        optimizer.step()
        return {**totals, "lr": rate, "gradient_norm": norm}

    def _reduce(self, leaves: list[Tensor], totals: dict[str, float]) -> dict[str, float]:
        """Averages gradients and figures over the processes; tokens are summed."""
        for leaf in leaves:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = self.accelerator.reduce(grad, reduction="mean")
        values = torch.tensor(list(totals.values()), dtype=torch.float64, device=self._device)
        values = self.accelerator.reduce(values, reduction="mean")
        averaged = dict(zip(totals, values.tolist(), strict=True))
        averaged["tokens"] *= self.accelerator.num_processes
        return averaged

    def _sample(self, position: int) -> int:
        """The sample at a position of the endless shuffled stream."""
        epoch, place = divmod(position, self._samples)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return int(torch.randperm(self._samples, generator=generator)[place])

    def _save(
        self,
        step: int,
        task: Task,
        optimizer: torch.optim.Optimizer,
        names: list[str],
        extra: dict[str, Any],
    ) -> None:
        if self._folder is None:
            return
        scratch = self._folder.begin(step)
        self.accelerator.wait_for_everyone()
        self._folder.add_rng(scratch, ckpt.rng_state(self._device))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = ckpt.optimizer_tensors(optimizer, names)
            self._folder.finish(scratch, step, task.parameters, state, extra)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _own_randomness(self, resume: ckpt.Checkpoint | None) -> Iterator[None]:
        """Torch's generators follow the seed or the checkpoint, and are put back afterwards."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._seed + self.accelerator.process_index)
            if resume is not None:
                ckpt.set_rng_state(resume.rng, self._device)
            yield

    @contextmanager
    def _metrics_file(self, first: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """metrics.jsonl, one line a step; lines past the step we go on from are dropped."""
        if self.output_dir is None or not self.accelerator.is_main_process:
            yield lambda figures: None
            return
        path = self.output_dir / "metrics.jsonl"
        kept = []
        if path.exists() and first:
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(f"{line}\n" for line in kept))
        scratch.replace(path)
        with path.open("a", encoding="utf-8") as file:

            def log(figures: dict[str, Any]) -> None:
                file.write(json.dumps(figures) + "\n")
                file.flush()

            yield log


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
