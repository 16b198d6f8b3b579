"""What the commands print."""

from typing import Any

from rich.table import Table

import rtpurbo
from rtpurbo.units import human_bytes


def figures_table(title: str, figures: dict[str, Any]) -> Table:
    """A row for each name and value."""
    table = Table(title=title, show_header=False)
    for name, value in figures.items():
        table.add_row(str(name), f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def stability_table(heads: rtpurbo.HeadMap) -> Table:
    """How far documents and lengths agree on the heads."""
    table = Table("between", "rank correlation", "overlap of the retrieval heads")
    for what in ("documents", "lengths"):
        agreement = heads.stability[what]
        table.add_row(what, f"{agreement['rank_correlation']:.2f}", f"{agreement['overlap']:.2f}")
    return table


def last_step(seen: dict[str, Any]) -> str:
    """A line about the last forward, from `rtpurbo.stats`."""
    held = seen["kv_bytes"] + seen["index_bytes"]
    whole = "" if seen["selecting_layers"] else " (retrieval heads read every key)"
    count = seen["fallbacks"]
    tiles = f"; {count:,} tiles of the prefill were dense for want of room" if count else ""
    return (
        f"last step: {seen['attended_tokens']:,.0f} of {seen['keys']:,} keys attended{whole}, "
        f"cache {human_bytes(held)} against {human_bytes(seen['dense_bytes'])} dense{tiles}"
    )
