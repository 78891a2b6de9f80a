"""Hypothesis draws the same examples, whatever tests run beside one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

import manyheads.request  # noqa: F401 (which has constants)


def test_examples_hold_no_constants_of_modules_that_others_import() -> None:
    if settings.default is None or not settings.default.derandomize:
        pytest.skip("other examples are asked for")
    assert len(providers._get_local_constants()) == 0
