"""Stage 2: the sparse model learns to predict what it predicted when it was dense."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtpurbo import families
from rtpurbo.adapt.loop import Loop, Schedule, TrainResult
from rtpurbo.adapt.lora import Adapter
from rtpurbo.adapt.samples import Samples, fingerprint
from rtpurbo.adapt.teacher import TOP, TeacherCache, label_rows
from rtpurbo.files import digest_of
from rtpurbo.patching import state

_MAX_GRADIENT_NORM = 1.0
_POSITIONS = 4096


def distill(
    model: Any,
    samples: Any,
    *,
    steps: int = 600,
    lr: float = 3e-6,
    lora: Any = None,
    teacher_cache: str | Path | None = None,
    warmup: int | None = None,
    batch_size: int = 8,
    gradient_checkpointing: bool = True,
    mixed_precision: Literal["no", "bf16"] = "no",
    output_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Trains the weights of a sparsified model towards the dense model's predictions.

    The loss is the mean over label tokens of KL(softmax(teacher's top-10 logits) ||
    softmax(student's logits of the same 10 tokens)). The teacher is this model run dense, before
    the first step; its logits are cached. The index is frozen. AdamW (0.9, 0.95), constant
    rate after a linear warm-up, weight decay 0.01, gradient norm clipped to 1.

    Where all weights are trained, a run that is interrupted leaves the model half trained. Load the
    original again before the next call: with output_dir that call then goes on from the last
    checkpoint, and without it the half-trained model would be its own teacher.

    Args:
        model: sparsified, float32 weights (unless lora); weights are changed in place.
        samples: as `tokens` of `train_index`; mappings may have `labels`, -100 where a token is not
            to be predicted. Without labels the last three quarters of a sequence count.
        lora: None trains all weights. A rank or a `peft.LoraConfig` trains an adapter, which is
            saved under output_dir/adapter and merged into the weights at the end.
        teacher_cache: folder of the cached logits (default: output_dir/teacher, or a temporary
            one). It is checked against model, data and mixed_precision, and used again if it fits.
        warmup: steps; a third of `steps` by default.
        batch_size: sequences a step over all processes; one at a time on each.
        gradient_checkpointing: recompute activations in the backward pass.
        mixed_precision: "bf16" runs the matrix products in bfloat16.
        output_dir: checkpoints and metrics.jsonl go here; the same call on the model as it was
            goes on from them.

    Returns:
        TrainResult. `metrics`: loss_first and loss_last, means over the first and last tenth of the
        steps of this call.
    """
    patched = state(model)
    model = families.unwrap(model)
    data = Samples(samples, "samples")
    _check(model, patched.config, data, lora)
    device = model.get_input_embeddings().weight.device
    identity = {"model": fingerprint(model), "data": data.fingerprint()}
    loop = Loop(
        "stage 2",
        Schedule(
            steps,
            lr,
            steps // 3 if warmup is None else warmup,
            "constant",
            batch_size,
            betas=(0.9, 0.95),
        ),
        samples=len(data),
        device=device,
        output_dir=output_dir,
        identity={
            **identity,
            "config": digest_of(patched.config.to_dict()),
            "lora": Adapter.describe(lora),
            "mixed_precision": mixed_precision,
        },
        seed=seed,
        checkpoint_every=checkpoint_every,
        progress=progress,
        mixed_precision=mixed_precision,
    )
    resume = loop.latest()
    with _teacher_folder(teacher_cache, loop.output_dir) as folder:
        about = {**identity, "mixed_precision": mixed_precision, "top": TOP}
        teacher = TeacherCache(folder, about, len(data))
        teacher.fill(model, data, loop)
        with Adapter(model, lora, seed) as adapter, _training(model, gradient_checkpointing):
            task = DistillTask(model, data, teacher, adapter.parameters(), loop)
            result = loop.run(task, resume, extra={})
            if loop.accelerator.is_main_process:
                adapter.save(loop.output_dir)
            adapter.merge()
    tenth = max(1, len(result.losses) // 10)
    if result.losses:
        result.metrics = {
            "loss_first": sum(result.losses[:tenth]) / tenth,
            "loss_last": sum(result.losses[-tenth:]) / tenth,
        }
    return result


class DistillTask:
    """The sparse student's weights as the loop's parameters."""

    loss_name = "loss"

    def __init__(
        self,
        model: Any,
        samples: Samples,
        teacher: TeacherCache,
        parameters: dict[str, Tensor],
        loop: Loop,
    ):
        self._model = model
        self._samples = samples
        self._teacher = teacher
        self._loop = loop
        self.parameters = parameters

    def backward(self, step: int, sample: int, weight: float) -> dict[str, float]:
        """Forward and backward of one sequence; the head's part goes by slices of label rows."""
        item = self._samples[sample]
        head = self._model.get_output_embeddings()
        device = head.weight.device
        rows = label_rows(item.tokens, item.labels).to(device)
        values, tokens = (tensor.to(device) for tensor in self._teacher[sample])
        with self._loop.autocast():
            hidden = families.decoder(self._model)(
                input_ids=item.tokens[None].to(device), use_cache=False
            ).last_hidden_state[0, rows]
        leaf = hidden.detach().requires_grad_()
        loss = 0.0
        for part in range(0, len(rows), _POSITIONS):
            here = slice(part, part + _POSITIONS)
            kl = _top_kl(leaf[here], head, values[here], tokens[here]).sum() / len(rows)
            (kl * weight).backward()
            loss += kl.item()
        hidden.backward(leaf.grad)
        return {"loss": loss, "tokens": float(len(item.tokens))}

    def clip(self) -> float:
        leaves = list(self.parameters.values())
        return float(nn.utils.clip_grad_norm_(leaves, _MAX_GRADIENT_NORM))


def _top_kl(hidden: Tensor, head: nn.Linear, values: Tensor, tokens: Tensor) -> Tensor:
    """[P], KL of the teacher's top entries from the student's, of which only those are computed."""
    weight = F.embedding(tokens, head.weight)
    logits = torch.einsum("pd,pkd->pk", hidden.float(), weight.float())
    if head.bias is not None:
        logits = logits + head.bias[tokens].float()
    teacher = values.log_softmax(-1)
    return (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1)


def _check(model: Any, config: Any, data: Samples, lora: Any) -> None:
    near = config.window + config.sinks
    longest = max(data.lengths(model.get_input_embeddings().num_embeddings))
    families.warn_beyond_context(model, longest, "rtpurbo.distill: the longest of the samples")
    if longest <= near:
        raise ValueError(
            f"rtpurbo.distill: the longest of the samples has {longest} tokens and the window and "
            f"sinks hold {near}, so the sparse model equals the dense one on all of them; use "
            "longer samples or a smaller window"
        )
    for i in range(len(data)):
        sample = data[i]
        if len(label_rows(sample.tokens, sample.labels)) == 0:
            raise ValueError(f"rtpurbo.distill: samples[{i}] has no label token after its first")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"rtpurbo.distill: the output embedding must be nn.Linear, got {type(head).__name__}"
        )
    if lora is None:
        for name, weight in model.named_parameters():
            if weight.dtype != torch.float32:
                raise TypeError(
                    f"rtpurbo.distill: {name} is {weight.dtype}, which would round away updates "
                    "of a small lr; call model.float() (and mixed_precision='bf16'), or use lora"
                )


@contextmanager
def _teacher_folder(given: str | Path | None, output_dir: Path | None) -> Iterator[Path]:
    if given is not None:
        yield Path(given)
    elif output_dir is not None:
        yield output_dir / "teacher"
    else:
        with tempfile.TemporaryDirectory(prefix="rtpurbo-teacher-") as scratch:
            yield Path(scratch)


@contextmanager
def _training(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Training mode, and checkpointing if asked for; both as before afterwards."""
    training, checkpointing = model.training, model.is_gradient_checkpointing
    model.train()
    if gradient_checkpointing and not checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if gradient_checkpointing and not checkpointing:
            model.gradient_checkpointing_disable()
        model.train(training)
