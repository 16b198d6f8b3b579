"""Which cases of the benchmarks run, and against which baselines."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.registry import Case


@dataclass(frozen=True)
class Choice:
    """Values that parameters may have, by name, and names of baselines; empty: all of them."""

    values: dict[str, set[str]]
    baselines: set[str]

    @classmethod
    def parse(cls, where: Iterable[str], baselines: Iterable[str]) -> "Choice":
        """From words like "keys=4096,mode=near"; one name with several values allows each.

        Raises:
            ValueError: a part is not NAME=VALUE.
        """
        values: dict[str, set[str]] = {}
        for part in _parts(where):
            name, equals, value = part.partition("=")
            if not (name and equals and value):
                raise ValueError(f"benchmarks: --where takes NAME=VALUE, got {part!r}")
            values.setdefault(name, set()).add(value)
        return cls(values, set(_parts(baselines)))

    def wants(self, parameters: dict[str, Any]) -> bool:
        """Whether the case has all named parameters with an allowed value."""
        return all(
            name in parameters and str(parameters[name]) in allowed
            for name, allowed in self.values.items()
        )

    def narrowed(self, case: Case) -> Case:
        """The case with the chosen baselines alone, and their goals."""
        if not self.baselines:
            return case
        return replace(
            case,
            baselines={n: run for n, run in case.baselines.items() if n in self.baselines},
            goals={n: goal for n, goal in case.goals.items() if n in self.baselines},
        )


def _parts(words: Iterable[str]) -> list[str]:
    return [part for word in words for part in word.split(",") if part]
