"""The pages in a real browser: talking, stopping, a server's death seen, accessibility.

Needs `pip install -e .[browser]` and a Chromium: Debian's chromium-headless-shell or chromium,
Google's, or the one of `playwright install chromium`. Pictures go to tests/e2e/screenshots.
"""

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.e2e.processes import end_all
from tests.e2e.test_gateway import started

playwright_api = pytest.importorskip("playwright.sync_api", reason="pip install -e .[browser]")
axe_api = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="pip install -e .[browser]"
)
expect = playwright_api.expect

pytestmark = pytest.mark.e2e

PICTURES = Path(__file__).with_name("screenshots")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser")
PATIENCE_MS = 30_000


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        path = next((found for name in NAMES if (found := shutil.which(name))), None)
        try:
            made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright_api.Error as error:
            pytest.skip(f"no Chromium that runs: {error.message.splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture
def opened(browser):
    """Opens pages; an error on any of them fails the test."""
    errors, contexts = [], []

    def open_page(**options):
        context = browser.new_context(viewport={"width": 1100, "height": 750}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        made = context.new_page()
        made.on("pageerror", lambda error: errors.append(str(error)))
        made.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        return made

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def swarm(model, serve):
    (first,) = serve(model, ["0:3"])
    return [first, *serve(model, ["3:7", "3:7"], join=first.address)]


@pytest.fixture
def url(model, swarm, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    process, url = started(
        "gateway", str(model), "--join", swarm[0].address, "--threads", "1",
        "--template", str(template), "--name", "tiny",
    )  # fmt: skip
    yield url
    end_all([process])


def picture(page, name):
    PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def check_access(page, name):
    """What axe finds wrong for people who don't see, or use no mouse."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        picture(page, f"{name}-{scheme}")
        found = axe_api.Axe().run(page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


def say(page, text):
    """Ask, and wait for the whole answer."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    note = page.locator(".turn.assistant .note").last
    expect(note).to_contain_text("first after", timeout=PATIENCE_MS)


def limit(page, tokens):
    """Set the longest answer; the tiny model's context holds 512 tokens."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Message", exact=True).focus()


def test_talking(url, opened):
    page = opened()
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    limit(page, 20)
    say(page, "The sea")
    expect(page.locator("#chain")).to_contain_text("answered by")
    answers = page.locator(".turn.assistant")
    said = answers.first.locator("div").first.inner_text()
    assert said

    limit(page, 350)
    page.keyboard.type("A very long answer")
    page.keyboard.press("Enter")
    expect(answers.nth(1).locator("div").first).to_contain_text(re.compile(".{5}"))
    page.keyboard.press("Escape")
    expect(answers.nth(1).locator(".note")).to_contain_text("stopped")
    page.get_by_role("button", name="Answer again").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()

    page.reload()
    expect(page.locator(".turn")).to_have_count(4)
    expect(answers.first.locator("div").first).to_have_text(said)
    page.set_viewport_size({"width": 390, "height": 800})
    expect(page.locator("#side")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    picture(page, "phone")
    page.get_by_role("button", name="New").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#side")).to_be_hidden()


def test_a_death_is_seen(url, swarm, opened):
    page = opened()
    page.goto(f"{url}/swarm")
    expect(page.locator("tbody tr")).to_have_count(3)
    expect(page.get_by_text("All blocks are served")).to_be_visible()
    for server in swarm[1:]:
        server.signal(signal.SIGKILL)
    missing = page.get_by_text(re.compile("nobody serves blocks")).first
    expect(missing).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator(".cover .missing")).to_have_count(4)
    picture(page, "death")


def test_everybody_can_use_the_pages(url, swarm, opened):
    page = opened(bypass_csp=True)  # what checks them is a script of another origin
    page.goto(url)
    limit(page, 20)
    say(page, "The sea")
    check_access(page, "chat")
    page.get_by_role("button", name="Settings").click()
    check_access(page, "settings")
    page.get_by_role("button", name="Done").click()
    page.set_viewport_size({"width": 390, "height": 800})
    page.get_by_role("button", name="Conversations").click()
    check_access(page, "chat-phone")
    page.goto(f"{url}/swarm")
    expect(page.locator("tbody tr")).to_have_count(3)
    check_access(page, "swarm-phone")
    page.set_viewport_size({"width": 1100, "height": 750})
    for server in swarm[1:]:
        server.signal(signal.SIGKILL)
    expect(page.locator(".cover .missing")).to_have_count(4, timeout=PATIENCE_MS)
    check_access(page, "swarm-missing")
