"""How the command line and the demo load a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_dense(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer, from a folder or a Hub id.

    Raises:
        FileNotFoundError: there is no such folder, and the Hub gave none.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise
        raise FileNotFoundError(
            f"rtpurbo: model {str(source)!r} is no folder here, and no Hub id that could be "
            f"loaded: {error}"
        ) from error
