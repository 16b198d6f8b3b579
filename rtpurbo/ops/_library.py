"""Loads the operator library once; every operator module imports `rtpurbo_ops` from here."""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent.parent / "lib" / "librtpurbo.so"

if not _LIBRARY.exists():
    raise ImportError(
        f"rtpurbo: the operator library {_LIBRARY} is missing; build it with "
        "`pip install --no-build-isolation -e .` in the source tree, or reinstall the package"
    )
torch.ops.load_library(str(_LIBRARY))

rtpurbo_ops = torch.ops.rtpurbo
