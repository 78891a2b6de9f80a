"""The pages in a real browser without a window: Chromium, as Debian has it. Without one, the tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.server.conftest import Running, launch

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
MUST = "PAGES_NEED_A_BROWSER"
"""The public CI sets it, which installs one: there nothing is left out unnoticed."""
KEY = "open sesame"
LAPTOP, PHONE = (1280, 800), (390, 780)
Open = Callable[..., "Page"]


def find_browser() -> str:
    """Where the browser is. Without one, tests are skipped, but fail where the environment says that one must be."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        text = f"no browser is installed: {', '.join(NAMES)}"
        pytest.fail(text) if os.environ.get(MUST) else pytest.skip(text)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """NOTE: an event loop runs as long as it is there, which tests of other modules could not bear."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_browser()
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose context is short."""
    running = launch(tmp_path_factory.mktemp("page"), "--max-model-len", "200", FAKE_TOKENIZER="1").wait_ready()
    yield running
    running.stop()


@pytest.fixture
def pause(served: Running) -> Iterator[Path]:
    """While there is such a file, the engine has no more steps of a request than it says."""
    path = served.pids.with_name("pause")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants a key for everything that may want one."""
    folder = tmp_path_factory.mktemp("locked")
    running = launch(folder, "--api-key", KEY, "--protect-info", FAKE_TOKENIZER="1").wait_ready()
    yield running
    running.stop()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens an address in a browser that knows nothing yet; no script may fail there, and no other server be asked.

    Args of what it gives: the address; the window's size; the system's theme.
    """
    wrong: list[str] = []
    contexts = []

    def open_page(url: str, size: tuple[int, int] = LAPTOP, theme: str = "light") -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=theme,  # type: ignore[arg-type]
            has_touch=size == PHONE,
            accept_downloads=True,
        )
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()

        def of_console(kind: str, text: str) -> None:
            # a browser tells of every answer that is an error; those are what some tests are about
            if kind in ("error", "warning") and "Failed to load resource" not in text:
                wrong.append(text)

        page.on("console", lambda message: of_console(message.type, message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        host = urlsplit(url).netloc
        page.on("request", lambda r: None if urlsplit(r.url).netloc in (host, "") else wrong.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
