"""The built site, served on loopback under a sub-path, and a browser that looks at it.

TINYVGPT_SITE names the site's folder, _build/html unless set; CHROMIUM the browser's program.
"""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from looking import PAGES, SITE, Looking

SUB_PATH = "/some/sub/path/"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Handler(SimpleHTTPRequestHandler):
    """Answers with the site's files under the sub-path, and with nothing elsewhere."""

    def send_head(self):
        if not self.path.startswith(SUB_PATH):
            return self.send_error(404, "outside of the site")
        self.path = "/" + self.path.removeprefix(SUB_PATH)
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address():
    """Where the site is served."""
    assert PAGES, f"no pages in {SITE}, first: make book"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{SUB_PATH}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium, which asks nobody for anything by itself."""
    from playwright.sync_api import sync_playwright

    named = os.environ.get("CHROMIUM")
    program = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program, "no Chromium: install it, or name its program in CHROMIUM"
    quiet = ["--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=PAGES)
def page(request, browser, address):
    """Every page in turn, opened once for all tests of a module."""
    with Looking(browser, address) as looking:
        looking.open(request.param)
        yield looking


@pytest.fixture
def looking(browser, address):
    """A browser's window at no page yet."""
    with Looking(browser, address) as looking:
        yield looking
