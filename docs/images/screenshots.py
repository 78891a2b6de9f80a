"""Takes the pictures of the pages, chat.png and dashboard.png, from a server that runs with the built-in model:

manyheads serve & python docs/images/screenshots.py http://127.0.0.1:8000
"""

from __future__ import annotations

import random
import shutil
import sys
import threading
from pathlib import Path

import httpx
from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parent
QUESTIONS = (
    "Tell me something about hip hop.",
    "Why is the sky blue?",
    "Who was Napoleon?",
    "Write a short story about a dragon.",
    "Give me a recipe for pancakes.",
)
USERS, SECONDS = 6, 150


def chat(browser: Browser, url: str) -> None:
    """Ask twice, and point at a step of the second reply."""
    page = browser.new_page(viewport={"width": 1180, "height": 720}, device_scale_factor=1.5)
    page.goto(url)
    for number, question in enumerate(("Who was Napoleon?", QUESTIONS[3], QUESTIONS[1])):
        if number < 2:
            page.get_by_role("button", name="New chat").click()
        replies = page.locator(".reply")
        count = replies.count()
        page.get_by_role("textbox", name="Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        replies.nth(count).get_by_role("button", name="Retry").wait_for()
    page.locator(".reply").first.locator(".run.n3").nth(3).hover()
    page.screenshot(path=FOLDER / "chat.png")
    page.close()


def ask(url: str, seed: int, is_over: threading.Event) -> None:
    """Be a user who reads for a while before asking again."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60) as client:
        while not is_over.wait(rng.expovariate(2.0)):
            messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
            client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 300})


def dashboard(browser: Browser, url: str) -> None:
    """Look on while some users ask, more and more of them."""
    page = browser.new_page(viewport={"width": 1180, "height": 700}, device_scale_factor=1.5)
    page.goto(f"{url}/dashboard")
    is_over = threading.Event()
    users = [threading.Thread(target=ask, args=(url, seed, is_over)) for seed in range(USERS)]
    for user in users:
        user.start()
        page.wait_for_timeout(1000 * SECONDS / USERS)
    page.wait_for_function("() => Number(document.querySelector('#numbers dd').firstChild.data) > 1")  # run just now
    page.screenshot(path=FOLDER / "dashboard.png")
    is_over.set()
    for user in users:
        user.join()
    page.close()


if __name__ == "__main__":
    address = sys.argv[1].rstrip("/")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        chat(chromium, address)
        dashboard(chromium, address)
