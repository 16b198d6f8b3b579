"""Stage 1: the index learns where the full attention of its retrieval heads goes.

The backbone is frozen and runs dense. Every attention layer, as it runs, hands over its q and k;
the KL of sampled rows and its gradient are taken there and then, so that nothing of a layer
outlives it and memory is O(N).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rtpurbo import families, ops
from rtpurbo.adapt.balance import Balance
from rtpurbo.adapt.calibrate import Calibration
from rtpurbo.adapt.loop import Loop, Schedule, TrainResult
from rtpurbo.adapt.samples import Sample, Samples, fingerprint
from rtpurbo.context import LayerContext, Observer
from rtpurbo.data import repeated_rows
from rtpurbo.files import digest_of
from rtpurbo.index import from_covariance
from rtpurbo.patching import observe, state

_MAX_GRADIENT_NORM = 1.0
_TRAINED = ("w_q", "w_k", "offset")


def train_index(
    model: Any,
    tokens: Any,
    *,
    steps: int = 600,
    lr: float = 1e-3,
    rows: int = 512,
    updates: int = 1,
    warmup: int | None = None,
    batch_size: int = 1,
    held_out: int = 1,
    mixed_precision: Literal["no", "bf16"] = "no",
    output_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Trains the index of a sparsified model and calibrates its thresholds.

    Per retrieval head the loss is the mean over rows m of KL(a_full(m) || a_index(m)); with
    index="beyond_window" keys inside sinks and window keep their true logits in a_index. Heads
    train independently: their losses are summed and each head's gradient is clipped to norm 1.
    The projections start from the singular directions of the pre-RoPE q.k on the data, and end in
    a basis in which 8 or 4 bits an index key cost little. AdamW, weight decay 0.01, linear
    warm-up, cosine decay.

    Args:
        model: sparsified; its weights are not changed.
        tokens: token sequences longer than the window: lists or tensors of ids,
            `rtpurbo.data.retrieval_sequences`, or a Hugging Face dataset with `input_ids` and
            optionally `rows`, the retrieval rows, and `attention_mask`, by which left padding is
            cut off. Sequences without rows get those that repeat what
            stood outside the window.
        steps: optimizer steps of `batch_size` sequences, all processes together.
        updates: steps taken on the same sequences, with other rows, before the next ones: a run of
            the frozen model then serves so many steps. Keeps q and k of the layers meanwhile.
        rows: query rows sampled from a sequence, half of them retrieval rows.
        warmup: steps; a sixth of `steps` by default.
        held_out: so many sequences, the last ones, are not trained on but measure the KL and
            calibrate the thresholds (where there are not more, they serve for both).
        mixed_precision: "bf16" runs the frozen model's matrix products in bfloat16.
        output_dir: checkpoints and metrics.jsonl go here; the same call on the same model goes on
            from them.

    Returns:
        TrainResult. `metrics`: kl_before (after the SVD), kl_after, the same on retrieval rows
        alone (kl_retrieval_before, kl_retrieval_after), and of the thresholds tile_density and
        tile_true_mass, all on the held-out sequences and averaged over heads.
    """
    patched = state(model)
    samples = Samples(tokens, "tokens")
    if held_out < 1 or rows < 2 or updates < 1:
        raise ValueError(
            "rtpurbo.train_index: held_out and updates must be >= 1 and rows >= 2, got "
            f"held_out={held_out}, updates={updates}, rows={rows}"
        )
    task = IndexTask(model, samples, rows=rows, updates=updates, seed=seed)
    task.check(samples)
    trained = max(len(samples) - held_out, 1)
    measured = list(range(max(len(samples) - held_out, 0), len(samples)))
    loop = Loop(
        "stage 1",
        Schedule(
            steps, lr, steps // 6 if warmup is None else warmup, "cosine", batch_size, updates
        ),
        samples=trained,
        device=task.device,
        output_dir=output_dir,
        identity={
            "model": fingerprint(families.unwrap(model)),
            "data": samples.fingerprint(),
            "config": digest_of(patched.config.to_dict()),
            "rows": rows,
            "held_out": held_out,
            "mixed_precision": mixed_precision,
        },
        seed=seed,
        checkpoint_every=checkpoint_every,
        progress=progress,
        mixed_precision=mixed_precision,
    )
    task.autocast = loop.autocast
    resume = loop.latest()
    if resume is None:
        task.initialise(measured[0])
        before = task.measure(measured)
    else:
        before = resume.extra
    result = loop.run(task, resume, extra=before)
    task.store()
    calibration, balance = Calibration(patched.config, patched.index), Balance(patched.index)
    after = task.measure(measured, calibration.observe, balance.observe)
    result.metrics = {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        **calibration.store(),
    }
    balance.store()
    patched.index.history["stage 1"] = {"steps": result.steps, **result.metrics}
    return result


class IndexTask:
    """The projections of all layers as the loop's parameters."""

    loss_name = "KL"

    def __init__(self, model: Any, samples: Samples, *, rows: int, updates: int, seed: int):
        patched = state(model)
        self._model = families.unwrap(model)
        self._decoder = families.decoder(self._model)
        self._config = patched.config
        self.device = self._model.get_input_embeddings().weight.device
        self._index = patched.index
        self._layers = {n: layer.to(self.device) for n, layer in patched.index.layers.items()}
        self._samples = samples
        self._rows = rows
        self._updates = updates
        self._seed = seed
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._kept: dict[tuple[int, int], list[_LayerInputs]] = {}
        self._near = self._config.near_window + self._config.sinks
        self.parameters = {
            f"{layer}.{name}": getattr(index, name).detach().float().clone().requires_grad_()
            for layer, index in self._layers.items()
            for name in _TRAINED
        }
        self._heads = sum(len(index.heads) for index in self._layers.values())
        if not self._heads:
            raise ValueError("rtpurbo.train_index: the head map names no retrieval head")

    def check(self, samples: Samples) -> None:
        """Raises ValueError where a sequence has wrong ids or nothing outside the window."""
        lengths = samples.lengths(self._model.get_input_embeddings().num_embeddings)
        families.warn_beyond_context(
            self._model, max(lengths), "rtpurbo.train_index: the longest of the tokens"
        )
        for i, length in enumerate(lengths):
            if length <= self._near + 1:
                raise ValueError(
                    f"rtpurbo.train_index: tokens[{i}] has {length} tokens, all within the window "
                    f"of {self._config.near_window} and {self._config.sinks} sinks, so there is "
                    "nothing to select; use longer sequences or a smaller window"
                )

    def initialise(self, sample: int) -> None:
        """Projections from the covariance of the pre-RoPE q and k of one sequence."""

        def fit(context: LayerContext, q: Tensor, k: Tensor, start: Tensor | None) -> None:
            if context.heads:
                cov_q, cov_k = _covariance(context.q_pre), _covariance(context.k_pre)
                fitted = from_covariance(context.heads, cov_q, cov_k, self._config).tensors()
                for name in _TRAINED:
                    self.parameters[f"{context.number}.{name}"].data.copy_(fitted[name])

        self._forward(self._samples[sample].tokens, fit)

    def backward(self, step: int, sample: int, weight: float) -> dict[str, float]:
        """KL and gradients of the rows drawn for this step, layer by layer as the model runs.

        With several updates a sequence, the inputs of its layers are kept until the last one.
        """
        block, use = divmod(step, self._updates)
        item = self._samples[sample]
        rows, retrieval = self._draw_rows(item, block, sample)
        kls: list[Tensor] = []

        def learn(inputs: _LayerInputs) -> None:
            with torch.enable_grad():
                kl, kl_rows = self._kl(inputs.at(use * self._rows, self._rows), rows[use])
                (kl.sum() * weight).backward()
            kls.append(kl_rows.detach()[0])

        def receive(context: LayerContext, q: Tensor, k: Tensor, start: Tensor | None) -> None:
            if context.heads:
                inputs = _LayerInputs.of(context, q, k, rows.flatten())
                if self._updates == 1:
                    learn(inputs)
                else:
                    self._kept[block, sample].append(inputs)

        self._kept = {key: kept for key, kept in self._kept.items() if key[0] == block}
        fresh = (block, sample) not in self._kept
        if fresh:
            self._kept[block, sample] = []
            self._forward(item.tokens, receive)
        for inputs in self._kept[block, sample]:
            learn(inputs)
        tokens = float(len(item.tokens) if fresh else 0)
        return {**_figures(torch.cat(kls), retrieval[use]), "tokens": tokens}

    @torch.no_grad()
    def measure(
        self, samples: list[int], *observers: Callable[[LayerContext, Tensor, Tensor], None]
    ) -> dict[str, float]:
        """Mean KL of rows at regular distances and of retrieval rows; observers see each layer's
        context, q and k on the way."""
        sums: dict[str, float] = {}
        for sample in samples:
            item = self._samples[sample]
            rows, retrieval = self._regular_rows(item)
            kls: list[Tensor] = []

            def look(
                context: LayerContext,
                q: Tensor,
                k: Tensor,
                start: Tensor | None,
                rows: Tensor = rows,
                kls: list[Tensor] = kls,
            ) -> None:
                if context.heads:
                    kls.append(self._kl(_LayerInputs.of(context, q, k, rows), rows)[1][0])
                    for observe_layer in observers:
                        observe_layer(context, q, k)

            self._forward(item.tokens, look)
            figures = _figures(torch.cat(kls), retrieval)
            for name, value in (("kl", figures["loss"]), ("kl_retrieval", figures["kl_retrieval"])):
                sums[name] = sums.get(name, 0.0) + value / len(samples)
        return sums

    def clip(self) -> float:
        """Clips per index query (its projection and offset) and per index key; returns the norm."""
        total = 0.0
        for layer in self._layers:
            w_q, w_k, offset = (self.parameters[f"{layer}.{name}"].grad for name in _TRAINED)
            query = (w_q.square().sum((1, 2)) + (0 if offset is None else offset.square())).sqrt()
            key = w_k.square().sum((1, 2)).sqrt()
            total += float(query.square().sum() + key.square().sum())
            factor = (_MAX_GRADIENT_NORM / query).clamp_max(1)
            w_q *= factor[:, None, None]
            w_k *= (_MAX_GRADIENT_NORM / key).clamp_max(1)[:, None, None]
            if offset is not None:
                offset *= factor
        return total**0.5

    @torch.no_grad()
    def store(self) -> None:
        """Puts what was trained into the patched model."""
        for layer, index in self._layers.items():
            for name in _TRAINED:
                getattr(index, name).copy_(self.parameters[f"{layer}.{name}"])
        self._index.trained = True

    def _forward(self, tokens: Tensor, observer: Observer) -> None:
        def exact(context: LayerContext, q: Tensor, k: Tensor, start: Tensor | None) -> None:
            with torch.autocast(self.device.type, enabled=False):
                observer(context, q, k, start)

        with torch.no_grad(), observe(self._model, exact), self.autocast():
            self._decoder(input_ids=tokens[None].to(self.device), use_cache=False)

    def _kl(self, inputs: "_LayerInputs", rows: Tensor) -> tuple[Tensor, Tensor]:
        """kl [R] with gradient and kl_rows [1, R, rows] of a layer."""
        context = inputs.context
        index = context.index
        w_q, w_k, offset = (self.parameters[f"{context.number}.{name}"] for name in _TRAINED)
        q_index, k_index = ops.index_project(
            inputs.q_pre, inputs.k_pre, w_q, w_k, index.heads, index.kv_heads
        )
        beyond = self._config.index == "beyond_window"
        kl, kl_rows, *_ = ops.index_kl(
            inputs.q,
            inputs.k,
            q_index,
            k_index,
            rows[None],
            index.heads,
            index.index_map,
            offset if beyond else None,
            self._config.window,
            self._config.sinks,
            context.module.scaling,
            beyond,
        )
        return kl, kl_rows

    def _retrieval_rows(self, item: Sample) -> Tensor:
        given = item.rows
        if given is None:
            given = repeated_rows(item.tokens.tolist(), self._near)
        elif any(not 0 <= row < len(item.tokens) for row in given):
            raise ValueError(
                f"rtpurbo.train_index: rows must lie in [0, {len(item.tokens)}), got "
                f"{min(given)} to {max(given)}"
            )
        return torch.tensor([row for row in given if row >= self._near], dtype=torch.int64)

    def _draw_rows(self, item: Sample, block: int, sample: int) -> tuple[Tensor, Tensor]:
        """[updates, rows]: random rows, half of them retrieval rows where there are so many, and
        which those are. A function of its arguments and the seed."""
        candidates = self._retrieval_rows(item)
        drawn_from = (self._seed << 40 ^ block << 20 ^ sample) % (1 << 63)
        generator = torch.Generator().manual_seed(drawn_from)
        drawn = []
        for _ in range(self._updates):
            order = torch.randperm(len(candidates), generator=generator)
            chosen = candidates[order[: self._rows // 2]]
            others = (self._rows - len(chosen),)
            uniform = torch.randint(self._near, len(item.tokens), others, generator=generator)
            drawn.append(self._sorted(chosen, uniform))
        rows, retrieval = zip(*drawn, strict=True)
        return torch.stack(rows), torch.stack(retrieval)

    def _regular_rows(self, item: Sample) -> tuple[Tensor, Tensor]:
        candidates = self._retrieval_rows(item)
        half = self._rows // 2
        chosen = candidates[:: max(1, -(-len(candidates) // half))]
        uniform = torch.linspace(self._near, len(item.tokens) - 1, half).long()
        return self._sorted(chosen, uniform)

    def _sorted(self, chosen: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        rows, order = torch.cat([chosen, uniform]).sort(stable=True)
        return rows.to(self.device), (order < len(chosen)).to(self.device)


@dataclass(frozen=True)
class _LayerInputs:
    """What the KL of a layer needs: q and q_pre [1, Hq, rows, D], k and k_pre [1, Hk, N, D]."""

    context: LayerContext
    q: Tensor
    k: Tensor
    q_pre: Tensor
    k_pre: Tensor

    @classmethod
    def of(cls, context: LayerContext, q: Tensor, k: Tensor, rows: Tensor) -> "_LayerInputs":
        q_pre, k_pre = context.q_pre, context.k_pre
        assert q_pre is not None and k_pre is not None
        return cls(context, q[:, :, rows], k, q_pre[:, :, rows], k_pre)

    def at(self, first: int, count: int) -> "_LayerInputs":
        """With so many of its rows."""
        q, q_pre = (states[:, :, first : first + count] for states in (self.q, self.q_pre))
        return replace(self, q=q, q_pre=q_pre)


def _covariance(states: Tensor | None) -> Tensor:
    """[1, H, N, D] -> [H, D, D], the mean outer product."""
    assert states is not None
    flat = states[0].float()
    return flat.transpose(1, 2) @ flat / flat.shape[1]


def _figures(kl_rows: Tensor, retrieval: Tensor) -> dict[str, float]:
    """Means of [heads, rows] over all rows and over the retrieval rows."""
    mean = float(kl_rows.mean())
    return {
        "loss": mean,
        "kl_retrieval": float(kl_rows[:, retrieval].mean()) if bool(retrieval.any()) else mean,
    }
