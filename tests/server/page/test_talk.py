"""A talk on the chat page: what is said, how it is shown, and what the tree did."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.server.conftest import Running
from tests.server.page.conftest import LAPTOP, PHONE, Open
from tests.server.page.talk import SAYS, ask, asked, send, text_of, told, wait_for


@pytest.mark.parametrize(("size", "theme"), [(LAPTOP, "light"), (PHONE, "dark")], ids=["laptop", "phone"])
def test_send(served: Running, open_page: Open, size: tuple[int, int], theme: str) -> None:
    page = open_page(served.url, size, theme)
    reply = ask(page, f"SAY[[{SAYS}]]")
    assert text_of(reply) == SAYS
    assert "a step" in reply.locator(".note").inner_text()
    assert page.get_by_role("textbox", name="Title").input_value() == f"SAY[[{SAYS}]]"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(shade) < 60) == (theme == "dark")
    assert page.get_by_role("button", name="Send").bounding_box()["y"] < size[1] - 30  # type: ignore[index]
    is_there = page.get_by_role("button", name="New chat").is_visible()
    assert is_there == (size == LAPTOP)
    if size == PHONE:
        page.get_by_role("button", name="Chats").tap()
        page.get_by_role("button", name="New chat").tap()
        assert not page.get_by_role("button", name="New chat").is_visible()
        assert page.locator(".message").count() == 0


def test_the_theme_can_be_chosen(served: Running, open_page: Open) -> None:
    page = open_page(served.url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Theme").select_option("dark")
    page.get_by_role("button", name="Done").click()
    is_dark = "() => getComputedStyle(document.documentElement).colorScheme === 'dark'"
    page.wait_for_function(is_dark)
    page.reload()
    assert page.evaluate(is_dark)


def test_stop(served: Running, open_page: Open, pause: Path) -> None:
    """What came stays, the engine hears of it, and the next request has it."""
    page = open_page(served.url)
    before = served.num_aborts()
    pause.write_text("2")
    send(page, "one")
    reply = page.locator(".reply")
    reply.get_by_text("6 tokens · 3.0 a step").wait_for()  # told while it streams
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Send").wait_for()
    pause.unlink()
    assert reply.locator(".note").inner_text().startswith("stopped")
    assert "The cat".startswith(text_of(reply)[:7])
    bodies = asked(page)
    ask(page, "SAY[[Well.]]")
    first, partial, last = told(bodies[0])
    assert (first, last) == ("one", "SAY[[Well.]]")
    assert partial.startswith("The cat")
    assert served.num_aborts() == before + 1


def test_the_tree_at_work(served: Running, open_page: Open) -> None:
    page = open_page(served.url)
    reply = ask(page, f"SAY[[{SAYS}]]")
    runs = reply.locator(".run")
    assert "".join(runs.all_inner_texts()).replace(" ", "") == SAYS.replace(" ", "")
    assert "n3" in (runs.nth(1).get_attribute("class") or "")
    tip = page.locator("#tip")
    runs.nth(1).hover()
    assert "3 tokens at once" in tip.inner_text()
    assert "3 guesses, 2 right" in tip.inner_text()
    assert tip.locator(".yes").count() == 2
    assert "<|assistant|>" in tip.locator(".no").inner_text()
    page.get_by_role("textbox", name="Message", exact=True).hover()
    assert not tip.is_visible()
    # by the keyboard alone, from step to step; the second shows nothing yet, as it ends in the middle of a character
    reply.locator(".body").last.focus()
    page.keyboard.press("ArrowRight")
    assert "Step 1:" in tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert "Step 3:" in tip.inner_text()
    assert runs.nth(1).evaluate("run => run.classList.contains('lit')")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    # while a reply grows, its text is drawn anew below the pointer
    page.get_by_role("button", name="New chat").click()
    send(page, f"SLOW SAY[[{SAYS}]]")
    runs.nth(0).hover()
    reply.get_by_role("button", name="Retry").wait_for()
    runs.nth(2).hover()
    assert "Step 4:" in tip.inner_text()
    page.get_by_role("navigation", name="Kept chats").get_by_role("button").last.click()
    runs.nth(1).hover()
    assert "3 guesses" in tip.inner_text(), "what was guessed is there as long as the page is"
    page.reload()
    runs.nth(1).hover()
    assert "is not kept" in tip.inner_text()
    page.get_by_role("switch", name="Tree at work").click()
    runs.nth(1).hover()
    assert not tip.is_visible()
    assert page.get_by_role("switch", name="Tree at work").get_attribute("aria-checked") == "false"


def test_what_a_model_says_is_text(served: Running, open_page: Open) -> None:
    """Marks are shown as they are meant, and nothing that it writes is run."""
    page = open_page(served.url)
    said = "# Cats\\n\\n- **small** ones\\n\\n```\\na **b**\\n```\\n\\n<img src=x onerror=alert(1)>".replace(
        "\\n", "\n"
    )
    page.get_by_role("textbox", name="Message", exact=True).fill(f"SAY[[{said}]]")
    page.keyboard.press("Enter")
    page.locator(".reply").get_by_text("onerror=alert").wait_for()
    page.get_by_role("button", name="Send").wait_for()
    body = page.locator(".reply .body").last
    assert body.locator("h3").inner_text() == "Cats"
    assert body.locator(".item strong").inner_text() == "small"
    assert body.locator("pre").inner_text() == "a **b**"
    assert body.locator("p").last.inner_text() == "<img src=x onerror=alert(1)>"
    assert body.locator("img").count() == 0


def test_no_character_is_lost(served: Running, open_page: Open) -> None:
    """Of any text each place is shown at most once, in order, and what is left out are marks and spaces alone."""
    page = open_page(served.url)
    script = """async () => {
      const { blocks } = await import(new URL("page/markdown.js", location.href));
      let seed = 1, bad = [];
      const parts = ["ä", "b c",
                     "*", "**", "`", "```", "\\n", "\\n\\n", "# ", "- ", "1. ", "> ", "|", " ", "  ", "é", "🐈"];
      for (let i = 0; i < 3000; i++) {
        let text = "";
        for (let k = 0; k < 12; k++) text += parts[(seed = (seed * 48271) % 2147483647) % parts.length];
        let at = 0, left = "";
        for (const block of blocks(text)) for (const [start, end] of block.pieces) {
          if (start < at || end < start || end > text.length) bad.push(text);
          left += text.slice(at, start);
          at = end;
        }
        if (/[^*`#\\-1.> \\n]/.test(left + text.slice(at))) bad.push(text);
      }
      return bad;
    }"""
    assert page.evaluate(script) == []


def test_a_failure_is_told_and_can_be_retried(served: Running, open_page: Open) -> None:
    page = open_page(served.url)
    assert ask(page, "FAIL please").locator(".note").inner_text() == "told to fail"
    page.get_by_role("button", name="New chat").click()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    reply = ask(page, "SAY[[Again.]]")
    assert reply.locator(".note").inner_text() == "The connection to the server was lost."
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Retry").click()
    wait_for(page, "Again.")


def test_a_screen_reader_is_told_when_a_reply_is_whole(served: Running, open_page: Open) -> None:
    page = open_page(served.url)
    ask(page, f"SAY[[{SAYS}]]")
    assert page.locator("#spoken").inner_text() == SAYS
    assert page.locator(".reply .body").last.get_attribute("aria-busy") == "false"
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, select")]
             .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_files_come_with_a_policy_and_no_key(locked: Running) -> None:
    with httpx.Client(base_url=locked.url) as client:
        for path in ("/", "/dashboard", "/page/chat.js", "/page/base.css"):
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert "default-src 'none'; script-src 'self'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert client.get("/page/none.js").status_code == 404
        assert client.get("/page/%2e%2e/app.py").status_code == 404
        assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401
