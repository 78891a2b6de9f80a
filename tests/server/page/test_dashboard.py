"""The dashboard as those see it who run a server."""

from __future__ import annotations

import httpx
import pytest

from tests.server.conftest import Running
from tests.server.page.conftest import LAPTOP, PHONE, Open


@pytest.mark.parametrize(("size", "theme"), [(LAPTOP, "light"), (PHONE, "dark")], ids=["laptop", "phone"])
def test_it_shows_what_happens(served: Running, open_page: Open, size: tuple[int, int], theme: str) -> None:
    page = open_page(f"{served.url}/dashboard", size, theme)
    page.get_by_text("ready", exact=True).wait_for()
    rate = page.get_by_role("img", name="tokens a second").first
    rate.wait_for()
    httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 60})
    page.wait_for_function(
        "() => parseFloat(document.querySelectorAll('#numbers dd')[2].innerText) > 0"
    )  # tokens a second
    depth = page.locator("#depth").get_by_role("row").all_inner_texts()
    assert [row.split() for row in depth] == [row.split() for row in ("1 60 % of 10", "2 40 % of 5", "3 50 % of 2")]
    assert page.locator("#numbers div").filter(has_text="Restarts").locator("dd").inner_text().startswith("0")
    assert "of 1K tokens" in page.locator("#numbers div").filter(has_text="K/V").inner_text()
    assert "to the first token" in page.locator("#times").inner_text()
    assert page.locator("#memory").get_by_role("row", name="weights").inner_text().endswith("13.5 GiB")
    assert page.locator("#model").inner_text() == "fake · 3 Medusa heads"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
    page.route("**/metrics", lambda route: route.abort())
    page.get_by_text("The server does not answer.").wait_for()
    page.unroute("**/metrics")
    page.get_by_text("ready", exact=True).wait_for()


def test_readings(served: Running, open_page: Open) -> None:
    """Counters that began again count from nothing; quantiles are Prometheus'."""
    page = open_page(f"{served.url}/dashboard")
    script = """async () => {
      const { Reading, growth, quantile } = await import(new URL("page/metrics.js", location.href));
      const text = (n, counts) =>
        `# HELP x y\\nmanyheads_n_total ${n}\\nother 9\\nmanyheads_by_total{kind="a,\\\\"b"} 2.0\\n` +
        ["0.1", "1.0", "+Inf"].map((le, i) => `manyheads_t_bucket{le="${le}"} ${counts[i]}`).join("\\n");
      const one = new Reading(text(5, [0, 0, 0]), 0), two = new Reading(text(7, [2, 4, 4]), 1);
      const again = new Reading(text(3, [0, 0, 1]), 2);
      return [growth(one, two, "n_total"), growth(two, again, "n_total"), two.all("by_total"), two.has("other"),
              quantile(one, two, "t", 0.5), quantile(one, two, "t", 0.75), quantile(one, one, "t", 0.5),
              quantile(one, again, "t", 0.5)];
    }"""
    assert page.evaluate(script) == [2, 3, [['a,\\"b', 2]], False, 0.1, 0.55, None, 1]


def test_replicas_and_an_engine_that_began_again(served: Running, open_page: Open) -> None:
    """Tokens since it began again are what counts, not a rate below zero."""
    page = open_page(f"{served.url}/dashboard")
    replicas = "".join(
        f'manyheads_engine_{name}{{engine="{engine}"}} {value}\n'
        for engine in ("a", "b")
        for name, value in (("requests_running", 3), ("requests_waiting", 1), ("generation_tokens_total", 500))
    )

    def says(tokens: int, steps: int, restarts: int) -> str:
        counts = {"generation_tokens_total": tokens, "decoding_row_steps_total": steps}
        gauges = {"num_requests_running": 3, "tree_size": 6, "engine_restarts_total": restarts}
        return replicas + "".join(f"manyheads_{name} {value}\n" for name, value in (counts | gauges).items())

    readings = iter([says(9000, 3000, 0), says(400, 100, 1)])
    last = says(400, 100, 1)
    page.route("**/metrics", lambda route: route.fulfill(body=next(readings, last)))
    page.reload()
    page.wait_for_function("() => document.querySelectorAll('#numbers dd')[5]?.innerText.startsWith('1')")
    numbers = page.locator("#numbers dd")
    assert float(numbers.nth(2).inner_text().split()[0]) > 0
    assert numbers.nth(3).inner_text().startswith("4.0"), "tokens a step"
    assert page.locator("#load").get_by_role("row").inner_text().split() == ["3–4", "6.0"]
    assert page.locator("#engines").get_by_role("row").nth(2).inner_text().split() == ["b", "3", "1", "500"]
