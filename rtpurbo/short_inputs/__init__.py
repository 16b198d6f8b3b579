"""The short-input rule: where retrieval heads read every key, as to select would take longer.

Selecting costs launches, and what it takes to score and rank the far keys; it spares reading most
of them. On a CPU it is always done. On CUDA measured constants decide for each decode step
(`decode`) and for each sparse prefill in 16-bit types (`prefill`); `RTPurboConfig.select_from`
decides otherwise.
"""

from rtpurbo.short_inputs.decode import decode_selects
from rtpurbo.short_inputs.prefill import prefill_selects

__all__ = ["decode_selects", "prefill_selects"]
