"""The chat page as people use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.server.conftest import Running
from tests.server.page.conftest import KEY, LAPTOP, PHONE, Open

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SAYS = "The cat 🐈 sat on the mat."


def asked(page: Page) -> list[dict[str, Any]]:
    """The bodies of the requests for replies, from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("/chat/completions") else None)
    return bodies


def told(body: dict[str, Any]) -> list[str]:
    return [message["content"] for message in body["messages"]]


def send(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def ask(page: Page, text: str) -> Locator:
    """Send, and wait for the whole reply."""
    replies = page.locator(".reply")
    mine = replies.count()
    send(page, text)
    replies.nth(mine).get_by_role("button", name="Retry").wait_for()
    return replies.nth(mine)


def text_of(element: Locator) -> str:
    return element.locator(".body").last.inner_text()


def wait_for(page: Page, text: str) -> None:
    """Until a reply says, or the line below it tells."""
    page.locator(".reply").get_by_text(text, exact=True).wait_for()


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


def test_a_new_chat_while_a_reply_streams(served: Running, open_page: Open, pause: Path) -> None:
    """The new one has nothing of the old one, which goes on by itself and is whole when one comes back."""
    page = open_page(served.url)
    pause.write_text("2")
    send(page, f"SAY[[{SAYS * 2}]]")
    page.locator(".reply .run").first.wait_for()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".message").count() == 0
    bodies = asked(page)
    page.get_by_role("textbox", name="Message", exact=True).fill("SAY[[Something else.]]")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    pause.unlink()
    page.get_by_role("button", name="Send").wait_for()
    assert [told(body) for body in bodies] == [["SAY[[Something else.]]"]]
    assert text_of(page.locator(".reply")) == "Something else."
    old = page.get_by_role("navigation", name="Kept chats").get_by_role("button", name="The cat")
    page.locator("#chats button:not(.busy)").nth(1).wait_for()
    old.click()
    assert text_of(page.locator(".reply")) == SAYS * 2
    bodies.clear()
    ask(page, "SAY[[Back.]]")
    assert told(bodies[0]) == [f"SAY[[{SAYS * 2}]]", SAYS * 2, "SAY[[Back.]]"]


def test_a_full_context(served: Running, open_page: Open) -> None:
    """What no longer fits is left out, which is said; a message that never fits can be shortened."""
    page = open_page(served.url)
    bodies = asked(page)
    long = "SAY[[Yes.]] " + "cat " * 40
    for i in range(4):
        ask(page, f"{i} {long}")
    assert told(bodies[0])[0].startswith("0 ")
    assert told(bodies[-1])[0].startswith(("1 ", "2 "))
    left_out = page.locator(".forgotten").count()
    assert left_out == 2 * int(told(bodies[-1])[0][0])
    assert page.get_by_text(f"The model no longer sees the {left_out} messages above").is_visible()
    assert text_of(page.locator(".reply").last) == "Yes."
    reply = ask(page, "dog " * 300)
    assert "This message alone does not fit" in reply.locator(".note").inner_text()
    page.locator(".user").last.hover()
    page.locator(".user").last.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit the message").fill("SAY[[Short.]]")
    page.keyboard.press("Enter")
    wait_for(page, "Short.")
    # a reply that reaches the end of the context is told, and can be gone on with
    page.get_by_role("button", name="New chat").click()
    reply = ask(page, "cat " * 60)
    assert reply.locator(".note").inner_text().startswith("cut off: the context is full")
    cut = text_of(reply)
    page.get_by_role("button", name="Continue").click()
    reply.get_by_text("The reply fills the model's context").wait_for()
    assert text_of(reply) == cut


def test_a_key_is_kept(locked: Running, open_page: Open) -> None:
    page = open_page(locked.url)
    field = page.get_by_label("This server asks for an API key")
    field.fill("wrong")
    page.keyboard.press("Enter")
    field.wait_for()
    send(page, "SAY[[In.]]")
    page.locator(".reply").get_by_text("send this server's API key").wait_for()
    field.fill(KEY)
    page.keyboard.press("Enter")
    wait_for(page, "In.")  # what was asked without it is asked again
    page.reload()
    page.get_by_text("fake", exact=True).wait_for()
    assert not field.is_visible()
    assert text_of(ask(page, "SAY[[Still in.]]")) == "Still in."
    page.get_by_role("link", name="Dashboard").click()
    page.get_by_text("Tokens a step").wait_for()
    assert not page.get_by_label("ask for an API key").is_visible()


def test_a_reload_keeps_chats(served: Running, open_page: Open, pause: Path) -> None:
    """Also what had come of a reply, which can be continued."""
    page = open_page(served.url)
    ask(page, f"SAY[[{SAYS}]]")
    page.get_by_role("button", name="New chat").click()
    pause.write_text("3")
    send(page, f"SAY[[{SAYS * 2}]]")
    page.locator(".reply").get_by_text("9 tokens").wait_for()
    page.reload()
    pause.unlink()
    chats = page.get_by_role("navigation", name="Kept chats").get_by_role("button")
    assert chats.count() == 2
    reply = page.locator(".reply")
    assert reply.locator(".note").inner_text().startswith("the page was left")
    partial = text_of(reply)
    assert SAYS.startswith(partial[:7])
    assert reply.locator(".run").count() >= 2, "the steps are kept"
    bodies = asked(page)
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Retry").wait_for()
    assert (told(bodies[0])[-1], bodies[0]["continue_final_message"]) == (partial, True)
    assert text_of(reply).startswith(partial + SAYS[:7]), "the fake engine begins its text again"
    chats.last.click()
    assert text_of(page.locator(".reply")) == SAYS


def test_everything_can_be_forgotten(served: Running, open_page: Open) -> None:
    """Also what streams meanwhile is not kept again."""
    page = open_page(served.url)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("API key").last.fill("a key")
    page.get_by_role("button", name="Done").click()
    bodies = asked(page)
    send(page, "SLOW one")
    page.locator(".reply .run").first.wait_for()
    assert bodies[0]["temperature"] == 0.3
    assert page.evaluate("() => Object.keys(localStorage).length") == 3
    page.get_by_role("button", name="Settings").click()
    page.on("dialog", lambda dialog: dialog.accept())
    with page.expect_navigation():
        page.get_by_role("button", name="Forget everything").click()
    assert page.evaluate("() => Object.keys(localStorage).length") == 0
    assert page.locator(".message").count() == 0


def test_retry_edit_rename_export_and_delete(served: Running, open_page: Open) -> None:
    page = open_page(served.url)
    bodies = asked(page)
    ask(page, "SAY[[One.]]")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Retry").wait_for()
    assert told(bodies[0]) == told(bodies[1]) == ["SAY[[One.]]"]
    ask(page, "SAY[[Two.]]")
    # what was said behind an earlier message is not lost: the edit begins a chat of its own
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit the message").fill("SAY[[Three.]]")
    page.keyboard.press("Enter")
    wait_for(page, "Three.")
    page.get_by_role("button", name="Send").wait_for()
    assert told(bodies[-1]) == ["SAY[[Three.]]"]
    chats = page.get_by_role("navigation", name="Kept chats").get_by_role("button")
    assert chats.count() == 2
    page.get_by_role("textbox", name="Title").fill("A fork")
    page.keyboard.press("Enter")
    assert chats.first.inner_text() == "A fork"
    page.get_by_role("button", name="This chat").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    assert download.value.suggested_filename == "A-fork.json"
    messages = json.loads(Path(download.value.path()).read_text())["messages"]
    assert messages == [{"role": "user", "content": "SAY[[Three.]]"}, {"role": "assistant", "content": "Three."}]
    page.get_by_role("button", name="This chat").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as Markdown").click()
    assert "**Reply**\n\nThree." in Path(download.value.path()).read_text()
    page.get_by_role("button", name="This chat").click()
    page.get_by_role("button", name="Delete this chat").click()
    assert chats.count() == 1
    page.get_by_role("button", name="Undo").click()
    assert chats.count() == 2
    chats.last.click()
    assert [text_of(reply) for reply in page.locator(".reply").all()] == ["One.", "Two."]


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


def test_a_full_browser_is_told(served: Running, open_page: Open) -> None:
    page = open_page(served.url)
    page.evaluate("localStorage.setItem('x', 'y'.repeat(5 * 1024 * 1024 - 200))")
    assert text_of(ask(page, "SAY[[Here all the same.]]")) == "Here all the same."
    assert page.get_by_text("This browser has no room left").is_visible()


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
