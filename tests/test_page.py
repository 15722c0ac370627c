"""The gateway's page in a headless Chromium, with a stub of the gateway."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from page_stub import GONE, LARGE, MIDDLE, NO_ENDPOINT, SMALL, StubGateway, chromium, status_of, stub_gateway
from playwright.sync_api import Browser, Locator, Page, expect

from serve.schemas import ServerState

expect.set_options(timeout=30_000)
LONG = "an-organisation-with-a-long-name/a-model-with-a-very-long-name-70B-Instruct-2026-10-AWQ-4bit"
DESKTOP = {"width": 1280, "height": 900}
FASTER = "{const own = setTimeout; window.setTimeout = (action, ms) => own(action, ms / 20)}"  # a poll each 0.1 s


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def gateway() -> Iterator[StubGateway]:
    with stub_gateway() as running:
        yield running


@dataclass
class Shown:
    """An open page. `problems`: errors and warnings of the console; `urls`: all that the page has asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def row(self, body: str, text: str) -> Locator:
        """The row with `text` in the part `body` of a table."""
        return self.page.locator(f"#{body} tr").filter(has_text=text)

    def hide(self, hidden: bool) -> None:
        """Tells the page that it is hidden, or visible again."""
        self.page.evaluate(
            "hidden => Object.defineProperty(document, 'hidden', {value: hidden, configurable: true})", hidden
        )
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def polls(self, gateway: StubGateway, wanted: int) -> int:
        """The requests for the status from now on, until there are `wanted`, or for one second if none is wanted."""
        before, found = len(gateway.bodies("/v1/status")), 0
        for _ in range(3000 if wanted else 100):
            self.page.wait_for_timeout(10)
            found = len(gateway.bodies("/v1/status")) - before
            if found >= max(wanted, 1):
                break
        return found


@pytest.fixture
def shown(browser: Browser, gateway: StubGateway) -> Iterator[Shown]:
    """The page, before it is opened. Whatever a test does: no problem, and no request leaves the server."""
    context = browser.new_context(viewport=DESKTOP)
    context.add_init_script(FASTER)
    found = Shown(context.new_page())

    def note(message: Any) -> None:
        if message.type in ("error", "warning"):
            found.problems.append(message.text)

    found.page.on("console", note)
    found.page.on("pageerror", lambda error: found.problems.append(str(error)))
    context.on("request", lambda request: found.urls.append(request.url))
    yield found
    context.close()
    assert found.problems == []
    assert [url for url in found.urls if not url.startswith(gateway.url)] == []
    assert gateway.url in found.urls


@pytest.fixture
def opened(shown: Shown, gateway: StubGateway) -> Shown:
    shown.page.goto(gateway.url)
    return shown


def test_a_typed_prompt_shows_its_candidates(opened: Shown, gateway: StubGateway) -> None:
    opened.page.get_by_role("textbox", name="Prompt").fill("What is two plus two?")
    expect(opened.page.locator("#candidates tr.chosen")).to_contain_text(LARGE)
    expect(opened.row("candidates", LARGE)).to_contain_text("0.945")  # 0.93, and 0.06 * 5 / 20 for five words
    expect(opened.row("candidates", SMALL)).to_contain_text("0.725")
    expect(opened.page.locator("#excluded")).to_have_text(f"{GONE}: {NO_ENDPOINT}")
    expect(opened.page.locator("#decision")).to_contain_text(f"{LARGE} is chosen (score)")
    assert gateway.bodies("/v1/route")[-1] == {"prompt": "What is two plus two?"}


def test_lambda_changes_the_choice_and_the_question(opened: Shown, gateway: StubGateway) -> None:
    gateway.finish.set()
    chosen = opened.page.locator("#candidates tr.chosen")
    expect(chosen).to_contain_text(LARGE)
    opened.page.get_by_role("slider", name="Lambda").press("End")
    expect(chosen).to_contain_text(SMALL)
    assert gateway.bodies("/v1/route")[-1]["lambda"] == 1
    opened.page.get_by_role("button", name="Ask the chosen model").click()
    expect(opened.page.locator("#answer")).to_have_text("The first friend gets 8.")
    assert gateway.bodies("/v1/chat/completions")[0]["model"] == "auto:1"


def test_an_answer_is_shown_as_it_arrives(opened: Shown, gateway: StubGateway) -> None:
    opened.page.get_by_role("button", name="Ask the chosen model").click()
    expect(opened.page.locator("#answer")).to_have_text("The first ")
    expect(opened.page.get_by_role("button", name="Ask the chosen model")).to_be_disabled()
    gateway.finish.set()
    expect(opened.page.locator("#answer")).to_have_text("The first friend gets 8.")
    expect(opened.page.locator("#served")).to_have_text(f"{LARGE} (score) · $0.000320")
    expect(opened.page.get_by_role("button", name="Stop")).to_be_disabled()


def test_the_keyboard_is_enough(opened: Shown, gateway: StubGateway) -> None:
    keyboard, focused = opened.page.keyboard, opened.page.locator(":focus")
    expect(opened.page.get_by_role("textbox", name="Prompt")).to_be_focused()
    keyboard.press("Control+Enter")
    expect(opened.page.locator("#answer")).to_have_text("The first ")
    keyboard.press("Tab")
    expect(focused).to_have_attribute("id", "lambda")
    keyboard.press("Tab")
    expect(focused).to_have_attribute("id", "stop")  # the other button is disabled
    keyboard.press("Enter")
    expect(opened.page.locator("#served")).to_have_text("stopped")
    gateway.finish.set()
    keyboard.press("Shift+Tab")
    expect(focused).to_have_attribute("id", "send")
    keyboard.press("Space")
    expect(opened.page.locator("#answer")).to_have_text("The first friend gets 8.")


def test_the_status_shows_traffic_spend_servers_and_decisions(opened: Shown, gateway: StubGateway) -> None:
    seen, traffic = gateway.status.replica, opened.page.get_by_role("region", name="Traffic")
    expect(traffic).to_contain_text("Replica k3x9 since")
    expect(opened.page.locator("#rate")).to_have_text(str(seen.requests_60_s))
    expect(traffic.get_by_role("img")).to_have_accessible_name(re.compile("^48 in the last 10 minutes, at most"))
    assert len(re.findall("[ML]", opened.page.locator("#line").get_attribute("d") or "")) == 60
    expect(opened.page.locator("#answers")).to_have_text("45")
    expect(opened.page.locator("#errors")).to_have_text("3 errors (6 %)")
    spent = sum(seen.spent_usd.values())
    expect(opened.page.locator("#spent")).to_have_text(f"${spent:.4f}")
    for policy, reference in (("most_expensive", 45 * 2e-3), ("best_single", 45 * 1.5e-3)):
        expect(opened.page.locator(f"#{policy}")).to_have_text(f"${reference - spent:.4f}")
        saved = f"{100 * (1 - spent / reference):.0f} % of ${reference:.4f}"
        expect(opened.page.locator(f"#{policy} + dd")).to_have_text(saved)
    decisions = sum(seen.decisions[MIDDLE].values())
    expect(opened.row("servers", MIDDLE)).to_contain_text(f"● closed{decisions}{int(100 * decisions / 48 + 0.5)} %")
    expect(opened.row("servers", GONE)).to_contain_text(f"{GONE}{NO_ENDPOINT}○ no server")
    rows = opened.page.locator("#latest tr")
    expect(rows).to_have_count(20)
    expect(rows.first).to_contain_text(gateway.status.latest[0].decision_id)
    expect(rows.first).to_contain_text("failed")
    expect(rows.nth(1)).to_contain_text(f"{gateway.status.latest[1].latency_s:.2f} s")


def test_the_status_follows_the_gateway(opened: Shown, gateway: StubGateway) -> None:
    expect(opened.row("servers", MIDDLE)).to_contain_text("● closed")
    expect(opened.page.locator("#health")).to_have_text("checkpoint c3ad3e39e69d5695")
    for state, text in (
        (ServerState(state="open", wait_s=7.4), "▲ open, 8 s left"),
        (ServerState(state="open", wait_s=0.0), "▲ open, a request may test it"),
        (ServerState(state="testing"), "◐ testing"),
        (ServerState(state="closed", wait_s=3.0), "◐ closed, waits 3 s"),
    ):
        gateway.status = status_of(**{MIDDLE: state}).model_copy(update={"canary": "d4", "refused": "runs/bad is torn"})
        expect(opened.row("servers", MIDDLE)).to_contain_text(text)
    expect(opened.page.locator("#health")).to_have_text(
        "checkpoint c3ad3e39e69d5695 · canary d4 · refused runs/bad is torn"
    )


def test_a_hidden_page_asks_for_nothing(opened: Shown, gateway: StubGateway) -> None:
    assert opened.polls(gateway, 3) >= 3
    opened.hide(True)
    opened.page.wait_for_timeout(300)  # a request that was under way
    assert opened.polls(gateway, 0) == 0
    opened.hide(False)
    assert opened.polls(gateway, 2) >= 2


def test_the_page_stays_with_one_replica(opened: Shown, gateway: StubGateway) -> None:
    replica = opened.page.locator("#replica")
    expect(replica).to_contain_text("Replica k3x9")
    other = status_of("other", decisions=16)
    gateway.turns = [gateway.status, other, other]
    opened.page.evaluate(
        "() => {window.seen = []; new MutationObserver(() => seen.push(document.querySelector('#answers').textContent))"
        ".observe(document.querySelector('#traffic'), {subtree: true, childList: true})}"
    )
    opened.polls(gateway, 20)
    assert "15" not in opened.page.evaluate("seen")
    gateway.turns = [other]  # the first replica has ended
    expect(replica).to_contain_text("Replica other")
    expect(opened.page.locator("#answers")).to_have_text("15")


def test_the_status_needs_the_api_key_if_there_are_keys(shown: Shown, gateway: StubGateway) -> None:
    gateway.key = "secret"
    shown.page.goto(gateway.url)
    key = shown.page.get_by_label("API key")
    expect(key).to_be_visible()
    expect(shown.page.locator("#health")).to_contain_text("the API key is missing or wrong")
    expect(shown.page.locator("#traffic")).to_be_hidden()
    assert shown.polls(gateway, 0) == 0
    key.fill("secret")
    expect(shown.row("servers", MIDDLE)).to_contain_text("● closed")
    expect(shown.page.locator("#candidates tr")).to_have_count(3)
    assert shown.polls(gateway, 3) >= 3
    refused = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"
    assert shown.problems == [refused] * 2
    shown.problems.clear()


def test_text_of_a_reply_is_never_markup(shown: Shown, gateway: StubGateway) -> None:
    evil = "<img src=x onerror=alert(1)>"
    latest = gateway.status.latest[0].model_copy(update={"model": evil, "reason": evil, "served": f"{evil}2"})
    servers = {evil: ServerState(state="missing", reason=evil)}
    changed = {"latest": [latest], "servers": servers, "refused": evil, "checkpoint": evil}
    gateway.status = gateway.status.model_copy(update=changed)
    shown.page.goto(gateway.url)
    expect(shown.row("servers", evil).first).to_contain_text(f"{evil}{evil}○ no server")
    expect(shown.row("latest", evil)).to_contain_text(f"{evil} · answered by {evil}2")
    expect(shown.page.locator("#health")).to_have_text(f"checkpoint {evil} · refused {evil}")
    expect(shown.page.locator("img")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1280, 1920])
def test_every_width_shows_the_page_without_sideways_scrolling(
    shown: Shown, gateway: StubGateway, width: int, scheme: Any
) -> None:
    latest = [one.model_copy(update={"model": LONG, "served": f"{LONG}-2"}) for one in gateway.status.latest]
    refused = f"runs/{LONG}: the encoder's fingerprint differs"
    gateway.status = status_of(**{LONG: ServerState(state="open", wait_s=59.0)}).model_copy(
        update={"latest": latest, "refused": refused}
    )
    shown.page.set_viewport_size({"width": width, "height": 800})
    shown.page.emulate_media(color_scheme=scheme)
    shown.page.goto(gateway.url)
    expect(shown.row("latest", LONG)).to_have_count(20)
    expect(shown.page.locator("#candidates tr")).to_have_count(3)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    back = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
