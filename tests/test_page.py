"""The chat page, as a browser shows it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from serving import TOOL, Serving


def test_the_page_may_load_nothing_else(server):
    response = server.client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*(?!["']?data:)""", response.text)
    assert "innerHTML" not in response.text


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    with Browser(tmp_path) as one:
        yield one


def keep(browser: Browser, name: str) -> None:
    """For people to look at: STEPJAX_PICTURES names a folder."""
    if folder := os.environ.get("STEPJAX_PICTURES"):
        Path(folder, f"{name}.png").write_bytes(browser.picture())


IDLE = "document.getElementById('stop').hidden"
LAST = "[...document.querySelectorAll('#log > .answer')].at(-1)"


@pytest.mark.browser
def test_a_conversation(server: Serving, browser: Browser):
    """Thinking is folded and streamed, the answer follows, then a second turn, a call of a tool and its result."""
    browser.open(server.url)
    browser.wait("document.getElementById('dot').classList.contains('up')")
    assert browser.run("document.getElementById('model').textContent") == "step-tiny"
    keep(browser, "empty")
    browser.run("document.getElementById('temperature').value = 0")
    browser.type("What is 467 + 358?\n")
    browser.wait(f"{LAST} && {IDLE}")
    assert browser.run(f"{LAST}.querySelector('.content').innerText") == "825"
    assert browser.run(f"{LAST}.querySelector('details').open") is False
    assert "carry" in browser.run(f"{LAST}.querySelector('.thoughts').textContent")
    assert re.match(r"Thought for [\d.]+ s", browser.run(f"{LAST}.querySelector('summary').textContent"))
    facts = browser.run(f"{LAST}.querySelector('.facts').textContent")
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · [23]\.\d+ tokens a step · \d+ % from drafts", facts), facts

    browser.run(f"document.getElementById('tools').value = {json.dumps(json.dumps([TOOL]))}")
    browser.type("How is the weather in Havana now?\n")
    browser.wait(f"document.querySelectorAll('.user').length === 2 && {IDLE}")
    card = browser.run(f"{LAST}.querySelector('.call').innerText")
    assert "get_weather" in card
    assert '"city"' in card
    keep(browser, "tool")
    browser.run("document.querySelector('details').open = true")
    browser.run('document.querySelector(\'.call textarea\').value = \'{"temp": 94, "sky": "cloudy"}\'')
    browser.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'Send results').click()")
    browser.wait(f"document.querySelector('.tool') && {IDLE} && {LAST}.querySelector('.content').innerText")
    assert browser.run("document.querySelectorAll('.fault').length") == 0
    keep(browser, "result")
    browser.run("settings(true)")
    keep(browser, "settings")
    assert browser.said == []


@pytest.mark.browser
def test_stop_and_what_is_refused(server: Serving, browser: Browser):
    before = server.unused()
    browser.open(server.url)
    browser.wait("document.getElementById('dot').classList.contains('up')")
    # An answer that does not end by itself: the page cannot ask for one, so its request is altered on the way.
    browser.run(
        "{ const old = window.fetch; window.fetch = (at, how) => { if (how && how.body) how = {...how, body: "
        "JSON.stringify({...JSON.parse(how.body), ignore_eos: true})}; return old(at, how); }; }"
    )
    browser.type("Hello\n")
    browser.wait(f"{LAST} && {LAST}.innerText.length > 200")
    browser.run("document.getElementById('stop').click()")
    browser.wait(IDLE)
    assert "stopped" in browser.run(f"{LAST}.querySelector('.facts').textContent")
    server.wait_until_unused(before)
    browser.run("document.getElementById('max-tokens').value = -1")
    browser.run("document.getElementById('input').focus()")
    browser.type("Hello\n")
    assert "max_tokens" in browser.wait("document.querySelector('.fault')?.innerText")


@pytest.mark.browser
def test_nothing_is_sent_before_the_model_is_known(server: Serving, browser: Browser):
    """The list of models is held back; until it comes, neither Enter nor a button sends, and the text stays."""
    hold = (
        "{ const fetch = window.fetch; window.sent = 0; const held = new Promise(done => window.release = done); "
        "window.fetch = async (url, options) => { if (url === 'v1/models') await held; "
        "window.sent += Boolean(options && options.body); return fetch(url, options); }; }"
    )
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=hold)
    browser.open(server.url)
    browser.type("Hello\n")
    browser.run("document.getElementById('form').requestSubmit()")
    browser.run("document.querySelector('.tries button').click()")
    assert browser.run("document.querySelectorAll('button:disabled').length") == 4  # Send and the three examples
    assert browser.run("[window.sent, document.getElementById('input').value].join()") == "0,Hello"
    browser.run("window.release()")
    browser.wait("!document.getElementById('send').disabled")
    browser.type("\n")
    browser.wait(f"{LAST} && {IDLE}")
    assert browser.run("window.sent") == 1
    assert browser.run("document.querySelectorAll('.fault').length") == 0


@pytest.mark.browser
def test_a_model_cannot_write_markup(server: Serving, browser: Browser):
    browser.open(server.url)
    text = "<img src=x onerror=alert(1)>\n```js\nlet a = '<b>';\n```\nand `code` and **bold** <script>alert(1)</script>"
    browser.run(f"window.box = document.createElement('div'); render(window.box, {json.dumps(text)})")
    assert browser.run("[...window.box.querySelectorAll('*')].map(e => e.tagName).join(' ')") == (
        "P PRE CODE P CODE STRONG"
    )
    assert browser.run("window.box.textContent").count("<script>") == 1
