"""How many pairs of a row and a key the masks of a causal prefill let through.

The rows are the last of as many positions as there are keys, by default all of them.
"""


def dense_pairs(keys: int, rows: int | None = None) -> int:
    before = keys - (keys if rows is None else rows)
    return (keys * (keys + 1) - before * (before + 1)) // 2


def near_pairs(keys: int, window: int, sinks: int, rows: int | None = None) -> int:
    """Pairs in which the row sees the key through its window or as a sink."""
    if rows is not None:
        return near_pairs(keys, window, sinks) - near_pairs(keys - rows, window, sinks)
    far = max(0, keys - window)  # rows for which sinks may lie outside the window
    beginning = min(far, sinks)
    return (
        dense_pairs(min(keys, window))
        + far * window
        + dense_pairs(beginning)
        + (far - beginning) * sinks
    )
