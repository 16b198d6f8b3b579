"""Which weights stage 2 trains: all of them, or a LoRA adapter that is merged at the end."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Adapter:
    """Inside the block the model's trainable weights require gradients, all others do not.

    Leaving the block by an exception takes the adapter off; flags are as before in any case.

    Args:
        lora: None (all weights), a rank, or a `peft.LoraConfig`.
        seed: of the adapter's initial values.
    """

    def __init__(self, model: Any, lora: Any, seed: int):
        self._model = model
        self._seed = seed
        self._config = _lora_config(lora)
        self._wrapped: Any = None

    @staticmethod
    def describe(lora: Any) -> str | None:
        """What must stay the same for a run to resume."""
        config = _lora_config(lora)
        if config is None:
            return None
        targets = config.target_modules
        names = targets if isinstance(targets, str) else sorted(targets or [])
        return f"r={config.r} alpha={config.lora_alpha} dropout={config.lora_dropout} {names}"

    def __enter__(self) -> "Adapter":
        self._flags = {
            name: weight.requires_grad for name, weight in self._model.named_parameters()
        }
        if self._config is None:
            self._model.requires_grad_(True)
        else:
            import peft

            with torch.random.fork_rng():
                torch.manual_seed(self._seed)
                self._wrapped = peft.get_peft_model(self._model, self._config)
        return self

    def parameters(self) -> dict[str, Tensor]:
        return {
            name: weight for name, weight in self._model.named_parameters() if weight.requires_grad
        }

    def save(self, output_dir: Path | None) -> None:
        """Writes the adapter in PEFT's format (safetensors)."""
        if self._wrapped is not None and output_dir is not None:
            self._wrapped.save_pretrained(output_dir / "adapter")

    def merge(self) -> None:
        """Adds the adapter to the weights and takes it off."""
        if self._wrapped is not None:
            self._wrapped.merge_and_unload()
            self._wrapped = None

    def __exit__(self, *_: object) -> None:
        if self._wrapped is not None:
            self._wrapped.unload()
            self._wrapped = None
        for name, weight in self._model.named_parameters():
            weight.requires_grad_(self._flags[name])
            weight.grad = None


def _lora_config(lora: Any) -> Any:
    if lora is None:
        return None
    import peft

    if isinstance(lora, int) and not isinstance(lora, bool):
        if lora < 1:
            raise ValueError(f"rtpurbo.distill: the lora rank must be >= 1, got {lora}")
        return peft.LoraConfig(
            r=lora, lora_alpha=2 * lora, target_modules=_TARGETS, task_type="CAUSAL_LM"
        )
    if not isinstance(lora, peft.LoraConfig):
        raise TypeError(
            f"rtpurbo.distill: lora must be None, a rank or a peft.LoraConfig, got {lora!r}"
        )
    return lora
