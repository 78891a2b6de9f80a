"""Where there is no browser, these tests are left out, unless one must be there."""

from __future__ import annotations

import pytest

from tests.server.page import conftest


@pytest.mark.parametrize(("must", "ends"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_browser_that_is_missing(must: str, ends: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(conftest.MUST, must)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ends, match="no browser is installed: chromium"):
        conftest.find_browser()
