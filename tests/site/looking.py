"""A window of the browser that writes down what goes wrong in it, and the site's files."""

import os
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("TINYVGPT_SITE", ROOT / "_build" / "html")).resolve()
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.glob("**/*.html"))
# Not the theme's own files, nor what leads on to the first page.
PAGES = [name for name in PAGES if not name.startswith("_static/") and name != "index.html"]
CHAPTERS = [name for name in PAGES if name.startswith("book/")]

OPEN_ALL = """() => {
  document.querySelectorAll('details').forEach(one => one.open = true);
  document.querySelectorAll('.toggle-hidden').forEach(one => one.classList.remove('toggle-hidden'));
}"""


class Looking:
    """One window; `errors` has what its console says, `failed` requests answered by an error."""

    def __init__(self, browser, address):
        self.address = address
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.context.route("**/*", self._let_through)
        self.window = self.context.new_page()
        self.window.set_default_timeout(15_000)
        self.errors, self.failed, self.outside = [], [], []
        self.window.on("console", self._said)
        self.window.on("pageerror", lambda error: self.errors.append(str(error)))
        self.window.on("response", self._answered)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def _let_through(self, route):
        url = route.request.url
        if url.startswith((self.address, "data:", "blob:", "file:")):
            route.continue_()
        else:
            self.outside.append(url)
            route.abort()

    def _said(self, message):
        if message.type == "error":
            self.errors.append(message.text)

    def _answered(self, response):
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")

    def open(self, name):
        """Opens a page of the site, formulas set and all that is folded unfolded."""
        self.name = name
        self.answer = self.window.goto(self.address + name, wait_until="load")
        self.window.evaluate("() => window.MathJax?.startup?.promise")
        self.window.evaluate(OPEN_ALL)

    def run(self, script, *arguments):
        """What a function in the page returns."""
        return self.window.evaluate(script, *arguments)

    def all(self, selector):
        """The page's elements."""
        return self.window.query_selector_all(selector)


class Elements(HTMLParser):
    """A page's elements as (name, attributes), without a browser."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed((SITE / page).read_text(encoding="utf-8"))

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def values(self, *names):
        """Every value of these attributes."""
        return [found[name] for _, found in self.found for name in names if found.get(name)]

    def all(self, *names):
        """The attributes of every element of these names."""
        return [attributes for name, attributes in self.found if name in names]
