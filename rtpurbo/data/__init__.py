"""Text to adapt and to judge with: prose any machine has, retrieval-rich sequences, needle prompts.

Nothing here downloads. `prose` reads documentation that is already installed; the generators hide
statements in it. Everything is a function of its arguments and a seed.
"""

from rtpurbo.data.needles import NeedlePrompt, needle_prompts
from rtpurbo.data.sequences import RetrievalSequence, repeated_rows, retrieval_sequences
from rtpurbo.data.sources import SOURCES, prose
from rtpurbo.data.stream import excerpts

__all__ = [
    "SOURCES",
    "NeedlePrompt",
    "RetrievalSequence",
    "excerpts",
    "needle_prompts",
    "prose",
    "repeated_rows",
    "retrieval_sequences",
]
