"""`evaluate`: tasks x lengths x modes on one model."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rtpurbo import families, patching
from rtpurbo.data import excerpts, needle_prompts, prose
from rtpurbo.data.stream import check_texts
from rtpurbo.environment import environment
from rtpurbo.evaluate import needles, texts
from rtpurbo.evaluate.modes import Footprint, mode
from rtpurbo.evaluate.report import EvalReport, EvalRow

Progress = Callable[[str, int, int], None]

_DECODED, _PREFILLED = ("kl", "nll"), ("prefill_kl", "prefill_nll")
_MODES = ("dense", "sparse")


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = ("niah", "mk8", "kl", "nll"),
    lengths: Sequence[int] = (4096, 8192),
    *,
    prompts: int = 20,
    seeds: Sequence[int] = (0,),
    documents: Sequence[str] | None = None,
    texts_per_seed: int = 3,
    rows: int = 128,
    window: int | None = None,
    window_divisor: int | None = None,
    modes: Sequence[str] | None = None,
    reference: Any = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Scores a model on needles and text, dense and sparse side by side.

    Args:
        model: sparse, or dense (then only mode "dense" is there). It is left as it was.
        tasks: "niah": one needle; "mkN": one of N needles is asked; the score is the share of exact
            answers, decoded greedily. "kl", "nll": KL to the dense model and loss of the last
            `rows` tokens of a text, one decode step each; "prefill_kl", "prefill_nll": the same of
            the second half, in one forward.
        lengths: tokens of a prompt with its answer, or of a text.
        prompts: prompts of a needle task for each length and seed.
        seeds: each makes its own prompts and texts; scores are also reported by seed.
        documents: what haystacks and texts are cut from; default: held-out `rtpurbo.data.prose`.
        texts_per_seed: texts of the other tasks for each length and seed.
        rows: decode steps of "kl" and "nll".
        window: of the local heads, for all lengths, in place of the configured one.
        window_divisor: the window is length // window_divisor instead, e.g. 8.
        modes: of "dense" and "sparse"; default: both, or what the model allows.
        reference: the dense model of the KL; default: this model run dense. Give the original model
            to measure a distilled one.
        progress: called with (what is running, prompts and texts done, in all).

    Returns:
        An EvalReport with one row for each task, length and mode.

    Raises:
        ValueError: an unknown task or mode, sizes that do not fit, or mode "sparse" asked of a
            dense model.
    """
    modes = _modes(model, modes)
    check_sizes(tasks, lengths, prompts, seeds, texts_per_seed, rows, window, window_divisor)
    if documents is None:
        haystack = prose(split="held_out")
    else:
        haystack = check_texts(documents, "rtpurbo.evaluate: documents")
    families.warn_beyond_context(
        families.unwrap(model), max(lengths), "rtpurbo.evaluate: the greatest of the lengths"
    )
    kinds = [task for task in tasks if _needles(task)]
    kinds += [t for t, names in (("", _DECODED), ("prefill_", _PREFILLED)) if {*tasks} & {*names}]
    counts = sum(prompts if _needles(kind) else texts_per_seed for kind in kinds)
    ticks = _Ticks(progress, counts * len(seeds) * len(lengths) * len(modes))
    found: list[EvalRow] = []
    for length in lengths:
        local = length // window_divisor if window_divisor else window
        for kind in kinds:
            for name in modes:
                with mode(model, name, local):
                    used = None if name == "dense" else patching.state(model).config.window
                    ticks.label = f"{_label(kind)} {length:,} {name}"
                    if _needles(kind):
                        batches = [
                            needle_prompts(
                                tokenizer, haystack, length, prompts, needles=_needles(kind), seed=s
                            )
                            for s in seeds
                        ]
                        found.append(_needle_row(model, kind, length, name, used, batches, ticks))
                        continue
                    samples = [
                        excerpts(tokenizer, haystack, length, texts_per_seed, seed)
                        for seed in seeds
                    ]
                    pair = _text_rows(
                        model, kind, length, name, used, samples, rows, reference, ticks
                    )
                    found += [row for row in pair if row.task in tasks]
    order = {task: i for i, task in enumerate(tasks)}
    found.sort(key=lambda row: (order[row.task], row.length, modes.index(row.mode)))
    return EvalReport(
        found,
        families.identity(families.unwrap(model)),
        {
            "config": _config(model),
            "prompts": prompts,
            "seeds": list(seeds),
            "texts_per_seed": texts_per_seed,
            "rows": rows,
            "window": window,
            "window_divisor": window_divisor,
            "reference": "given" if reference is not None else "own weights, dense",
            "documents": "held-out prose" if documents is None else "given",
            "environment": environment(),
        },
    )


class _Ticks:
    def __init__(self, progress: Progress | None, total: int):
        self.label = ""
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self.label, self._done, self._total)


def _needle_row(
    model: Any,
    task: str,
    length: int,
    name: str,
    window: int | None,
    batches: list[list[Any]],
    ticks: _Ticks,
) -> EvalRow:
    began, footprint, by_seed = time.perf_counter(), Footprint(), []
    for batch in batches:
        right = 0
        for prompt in batch:
            right += needles.answers(model, name, prompt, footprint)
            ticks()
        by_seed.append(right / len(batch))
    return EvalRow(
        task,
        length,
        name,
        sum(by_seed) / len(by_seed),
        sum(map(len, batches)),
        by_seed,
        window,
        seconds=time.perf_counter() - began,
        **footprint.figures(),
    )


def _text_rows(
    model: Any,
    kind: str,
    length: int,
    name: str,
    window: int | None,
    samples: list[list[list[int]]],
    rows: int,
    reference: Any,
    ticks: _Ticks,
) -> list[EvalRow]:
    """The rows of KL and NLL, which one run gives."""
    began, footprint = time.perf_counter(), Footprint()
    teacher = model if reference is None else reference
    count = rows if not kind else length // 2
    by_seed = []
    for batch in samples:
        total = torch.zeros(2, dtype=torch.float64)
        for tokens in batch:
            if kind:
                hidden = texts.prefilled(model, tokens, count)
            else:
                hidden = texts.decoded(model, name, tokens, count, footprint)
            if name == "dense" and reference is None:
                known = hidden
            else:
                with mode(teacher, "dense", None):
                    known = texts.prefilled(teacher, tokens, count)
            total = total + texts.losses(model, hidden, tokens, teacher, known)
            ticks()
        by_seed.append((total / len(batch)).tolist())
    spent = time.perf_counter() - began
    return [
        EvalRow(
            f"{kind}{what}",
            length,
            name,
            sum(pair[i] for pair in by_seed) / len(by_seed),
            sum(map(len, samples)),
            [pair[i] for pair in by_seed],
            window,
            seconds=spent,
            **footprint.figures(),
        )
        for i, what in enumerate(("kl", "nll"))
    ]


def _needles(task: str) -> int:
    """Needles in a prompt of the task; 0 if it is no needle task."""
    if task == "niah":
        return 1
    match = re.fullmatch(r"mk([1-9]\d{0,2})", task)
    return int(match[1]) if match else 0


def _label(kind: str) -> str:
    return kind if _needles(kind) else f"text, {'prefill' if kind else 'decode'},"


def _modes(model: Any, modes: Sequence[str] | None) -> list[str]:
    sparse = patching.is_sparse(model)
    if modes is None:
        return [*_MODES] if sparse else ["dense"]
    if isinstance(modes, str) or not modes or not set(modes) <= set(_MODES):
        raise ValueError(f"rtpurbo.evaluate: modes must be among {_MODES}, got {modes!r}")
    if "sparse" in modes and not sparse:
        raise ValueError(
            "rtpurbo.evaluate: mode 'sparse' needs a sparse model; call rtpurbo.sparsify first"
        )
    return list(dict.fromkeys(modes))


def check_sizes(
    tasks: Sequence[str],
    lengths: Sequence[int],
    prompts: int,
    seeds: Sequence[int],
    texts_per_seed: int,
    rows: int,
    window: int | None,
    window_divisor: int | None,
) -> None:
    """Refuses arguments of `evaluate` that no model could make right."""
    for name, values in (("lengths", lengths), ("seeds", seeds)):
        if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
            raise ValueError(
                f"rtpurbo.evaluate: {name} must be a list of ints, got {values!r}"
                + (f"; write [{values}]" if type(values) is int else "")
            )
    texts_known = _DECODED + _PREFILLED
    unknown = [task for task in tasks if not _needles(task) and task not in texts_known]
    if isinstance(tasks, str) or unknown or not tasks:
        raise ValueError(
            "rtpurbo.evaluate: tasks must be among 'niah', 'mkN' (as 'mk8'), "
            f"{', '.join(map(repr, texts_known))}, got {tasks!r}"
        )
    if not lengths or not seeds or min(prompts, texts_per_seed, rows) < 1:
        raise ValueError(
            "rtpurbo.evaluate: lengths and seeds must not be empty, and prompts, texts_per_seed "
            f"and rows be >= 1, got {list(lengths)}, {list(seeds)}, {prompts}, {texts_per_seed} "
            f"and {rows}"
        )
    if "kl" in tasks or "nll" in tasks:
        short = [length for length in lengths if length < rows + 2]
        if short:
            raise ValueError(
                f"rtpurbo.evaluate: lengths must be at least rows + 2 = {rows + 2} for 'kl' and "
                f"'nll', got {short}; ask for fewer rows"
            )
    if window is not None and window_divisor is not None:
        raise ValueError("rtpurbo.evaluate: give window or window_divisor, not both")
    if window_divisor is not None and (window_divisor < 1 or min(lengths) < window_divisor):
        raise ValueError(
            f"rtpurbo.evaluate: window_divisor must be in [1, {min(lengths)}], got {window_divisor}"
        )


def _config(model: Any) -> dict[str, Any] | None:
    """The configuration without its head map, which is large and has a file of its own."""
    if not patching.is_sparse(model):
        return None
    config = patching.state(model).config.to_dict()
    del config["heads"]
    return config
