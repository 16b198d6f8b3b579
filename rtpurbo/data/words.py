"""Keys and values of the statements that are hidden in texts."""

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_QUALITIES = _words(
    "amber ancient bitter bronze careful cheerful clever cobalt copper coral distant dusty "
    "eager early faded fragrant frozen gentle gilded hidden humble ivory jagged lively lonely "
    "marble mellow modest narrow noble patient pale polished proud quiet restless rustic "
    "scarlet serene silver slender solemn sturdy tender timid velvet violet wandering weary "
    "winter"
)
_THINGS = _words(
    "abbey almond anvil atlas beacon bellows birch bridge canyon cedar chalice cipher compass "
    "cottage dagger delta easel ferry fiddle garnet glacier hammock harvest helmet inlet "
    "juniper kettle ladder lagoon ledger mantle meadow mosaic oasis otter pavilion pepper "
    "pigeon prairie raven reef saffron sparrow tavern thimble tunnel turret walnut willow"
)


KEYS = len(_QUALITIES) * len(_THINGS)
"""How many different keys there are."""


def keys(rng: random.Random, count: int) -> list[str]:
    """`count` different pairs of words."""
    pairs = rng.sample(range(KEYS), count)
    return [f"{_QUALITIES[p % len(_QUALITIES)]}-{_THINGS[p // len(_QUALITIES)]}" for p in pairs]


def value(rng: random.Random) -> str:
    """A number of seven digits, or sometimes eight hexadecimal ones."""
    if rng.random() < 0.6:
        return str(rng.randrange(1_000_000, 10_000_000))
    return f"{rng.getrandbits(32):08x}"
