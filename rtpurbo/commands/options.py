"""Arguments and options that several commands take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer


class DType(StrEnum):
    """Element types of loaded weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class IndexForm(StrEnum):
    """Forms of the index; see RTPurboConfig."""

    beyond_window = "beyond_window"
    full = "full"


class Prefill(StrEnum):
    """How retrieval heads prefill."""

    dense = "dense"
    sparse = "sparse"


class Mode(StrEnum):
    """How a model is evaluated."""

    dense = "dense"
    sparse = "sparse"


ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]
TextsOption = Annotated[
    list[Path] | None,
    typer.Option("--texts", help="Text files to use, repeatable [default: prose of this machine]."),
]
DTypeOption = Annotated[DType, typer.Option(help="Element type of the weights.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")]
SelectFromOption = Annotated[
    int | None,
    typer.Option(
        help="Far keys from which retrieval heads select [default: as the model says; on a GPU "
        "from where it is quicker]."
    ),
]
PrefillOption = Annotated[
    Prefill | None,
    typer.Option(help="Prefill of retrieval heads [default: as the model says]."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]


def element_type(dtype: DType) -> torch.dtype:
    """PyTorch's name of it."""
    return getattr(torch, dtype.value)
