"""A real browser for the tests of pages: Debian's Chromium without a screen. They are skipped where it is missing."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium")
WAIT_MS = 120_000
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-default-apps"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not here (Debian: chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=WAIT_MS)
        yield opened
        opened.close()


@pytest.fixture
def open_file(browser):
    """Opens a file as a page, at most `width` pixels wide, that must ask for nothing and run without an error."""
    contexts = []

    def open_page(path, width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        return page

    asked, problems = [], []
    yield open_page
    for context in contexts:
        context.close()
    assert not problems and all(url.startswith(("file:", "data:")) for url in asked)
