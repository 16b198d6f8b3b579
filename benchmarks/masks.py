"""How many pairs of a row and a key the masks of a causal prefill let through."""


def dense_pairs(keys: int) -> int:
    return keys * (keys + 1) // 2


def near_pairs(keys: int, window: int, sinks: int) -> int:
    """Pairs in which the row sees the key through its window or as a sink."""
    far = max(0, keys - window)  # rows for which sinks may lie outside the window
    beginning = min(far, sinks)
    return (
        dense_pairs(min(keys, window))
        + far * window
        + dense_pairs(beginning)
        + (far - beginning) * sinks
    )
