"""What tests of the chat page do there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def edit(page: Page, message: Locator, text: str) -> None:
    """Change a message that was sent; it is answered anew."""
    message.hover()
    message.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edit the message").fill(text)
    page.keyboard.press("Enter")


def text_of(element: Locator) -> str:
    return element.locator(".body").last.inner_text()


def wait_for(page: Page, text: str) -> None:
    """Until a reply says, or the line below it tells."""
    page.locator(".reply").get_by_text(text, exact=True).wait_for()
