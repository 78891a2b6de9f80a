"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest
import torch

import tests.kernels  # noqa: F401 (before any kernel is imported it must be clear whether Triton's interpreter runs it)


def pytest_configure(config: pytest.Config) -> None:
    """The same examples every time, so that a change is not refused for what another one has broken.

    `--hypothesis-profile=random` looks for new ones. The process that hands tests out to others (`-n`) draws none.
    """
    if config.getoption("dist", "no") != "no" and not config.getoption("hypothesis_profile", None):
        return
    from hypothesis import settings
    from hypothesis.internal.conjecture import providers

    settings.register_profile("same", derandomize=True)
    settings.register_profile("random", derandomize=False)
    chosen = config.getoption("hypothesis_profile", None) or "same"
    settings.load_profile(chosen)
    if settings.default is not None and settings.default.derandomize:
        # the same examples are the same beside other tests: else they hold constants of whatever modules these import
        providers.is_local_module_file = lambda path: False


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """A test that draws from torch's own generator gets the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """An engine that is built looks for garbage first: among what imports have made, it need not look 300 times."""
    gc.collect()
    gc.freeze()
