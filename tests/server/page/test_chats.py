"""What the chat page keeps of chats, and what of them the model is told."""

from __future__ import annotations

import json
from pathlib import Path

from tests.server.conftest import Running
from tests.server.page.conftest import KEY, Open
from tests.server.page.talk import SAYS, ask, asked, edit, send, text_of, told, wait_for


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
    edit(page, page.locator(".user").last, "SAY[[Short.]]")
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
    edit(page, page.locator(".user").first, "SAY[[Three.]]")
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


def test_a_full_browser_is_told(served: Running, open_page: Open) -> None:
    page = open_page(served.url)
    page.evaluate("localStorage.setItem('x', 'y'.repeat(5 * 1024 * 1024 - 200))")
    assert text_of(ask(page, "SAY[[Here all the same.]]")) == "Here all the same."
    assert page.get_by_text("This browser has no room left").is_visible()
