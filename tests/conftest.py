"""One thread, fixed seeds and few hypothesis examples; `pytest --full` draws many, at random.

`pytest --hypothesis-profile=fresh --hypothesis-seed=SEED` draws as few, of that seed.
"""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, max_examples=300)
hypothesis.settings.register_profile("fresh", deadline=None, max_examples=40, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="many random examples of every property")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "quick")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Whatever at::empty allocates, in C++ too, holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
