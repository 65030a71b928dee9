"""MyST Markdown to the Markdown that every notebook shows: no directive, no role.

Admonitions become quotes, figures images with a line below them, included files fences of code,
references the name of what they refer to, with a link where its address is known. A directive or
role that isn't handled here is an error, so that none is left in a published notebook.
"""

import base64
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from addresses import ROOT, Addresses
from directives import Directive, pieces
from labels import EQUATION, authors, sources, targets, title
from sphinx.directives.code import LiteralInclude, LiteralIncludeReader

ROLE = re.compile(r"\{([a-z]+(?::[a-z]+)?)\}`([^`]+)`")
PAGE_LINK = re.compile(r"\[([^\]]*)\]\((\w+)\.md\)")
ADMONITIONS = {"note", "tip", "hint", "important", "warning", "caution", "danger", "seealso"}


def link(text: str, url: str) -> str:
    """A link, or the text alone where there is nothing to link to."""
    return f"[{text}]({url})" if url else text


def quote(heading: str, body: str) -> str:
    """A quote that begins with a bold line."""
    lines = f"**{heading}**\n\n{body}".splitlines()
    return "\n".join(f"> {line}".rstrip() for line in lines)


@dataclass(frozen=True)
class Plain:
    """Turns the Markdown of one chapter into plain Markdown."""

    page: str  # the chapter, such as book/01_clips
    where: Addresses

    def __call__(self, source: str) -> str:
        """The whole of a source, with nothing of MyST left.

        Raises:
            ValueError: a directive, role or label that isn't known.
        """
        parts = [self.directive(d) if d else self.text(text) for d, text in pieces(source)]
        return "\n".join(parts).strip("\n")

    def url(self, page: str, label: str = "") -> str:
        """Where the site has a page, or a place in it; "" if the site isn't known."""
        anchor = f"#{label}" if label else ""
        return f"{self.where.site}/{page}.html{anchor}" if self.where.site else ""

    def directive(self, d: Directive) -> str:
        """What stands in a directive's place."""
        if d.name == "code":
            return d.body
        if d.name == "figure":
            return self.figure(d)
        if d.name == "literalinclude":
            return self.included(d)
        if d.name in ("exercise-start", "exercise-end", "solution-end"):
            return self.exercise(d) if d.name == "exercise-start" else ""
        if d.name in ADMONITIONS:
            return quote(d.argument or d.name.capitalize(), self(d.body))
        if d.name == "admonition":
            return quote(self.text(d.argument), self(d.body))
        if d.name == "dropdown":
            return folded(self.text(d.argument), self(d.body))
        raise ValueError(f"{self.page}: notebooks have nothing for the directive {d.name!r}")

    def exercise(self, d: Directive) -> str:
        """An exercise's heading."""
        return f"### {targets()[d.options['label']].name}: {d.argument}"

    def figure(self, d: Directive) -> str:
        """An image, and its caption with its number."""
        image = f"![{d.options['alt']}]({self.image(d.argument)})"
        return f"{image}\n\n{self.caption(d.options.get('name', ''), d.body)}" if d.body else image

    def caption(self, label: str, source: str) -> str:
        """The line below a figure."""
        number = f"**{targets()[label].name}.** " if label else ""
        return number + self(source.strip())

    def image(self, path: str) -> str:
        """A picture's address: on the site, which Colab needs; else the picture itself."""
        file = ROOT / Path(self.page).parent / path
        if self.where.site and file.parent == ROOT / "book" / "_static":
            return f"{self.where.site}/_static/{file.name}"
        data = base64.b64encode(file.read_bytes()).decode()
        return f"data:{mimetypes.guess_type(file.name)[0]};base64,{data}"

    def included(self, d: Directive) -> str:
        """A file's lines, as a fence of code; Sphinx chooses them."""
        path = ROOT / Path(self.page).parent / d.argument
        options = {k: LiteralInclude.option_spec[k](value) for k, value in d.options.items()}
        config = SimpleNamespace(source_encoding="utf-8")
        code, _ = LiteralIncludeReader(str(path), options, config).read()
        language = {"cuda": "cpp"}.get(options["language"], options["language"])
        return f"```{language}\n{code.rstrip()}\n```"

    def text(self, source: str) -> str:
        """Text with no directive: its roles, labelled equations and links to other pages."""
        source = EQUATION.sub(lambda m: rf"\tag{{{targets()[m[1]].number}}}" + "\n$$", source)
        source = ROLE.sub(lambda m: self.role(m[1], m[2]), source)
        return PAGE_LINK.sub(lambda m: self.page_link(m[1], f"book/{m[2]}"), source)

    def page_link(self, text: str, page: str) -> str:
        """A link to another page."""
        return link(text or title(page), self.url(page))

    def role(self, name: str, content: str) -> str:
        """What stands in a role's place."""
        explicit = re.fullmatch(r"(.*?)\s*<([^<>]+)>", content, re.DOTALL)
        text, target = explicit.groups() if explicit else ("", content)
        if name in ("ref", "numref", "eq"):
            return self.reference(text, target)
        if name in ("cite", "cite:p", "cite:t"):
            return self.citation(name, target)
        if name == "term":
            return link(text or target, self.url("book/glossary"))
        if name == "doc":
            return self.page_link(text, f"{Path(self.page).parent.as_posix()}/{target}")
        if name == "download":
            repository = self.where.repository
            path = Path(self.page).parent / target
            return link(text, repository and f"{repository}/blob/main/{path.as_posix()}")
        raise ValueError(f"{self.page}: notebooks have nothing for the role {name!r}")

    def reference(self, text: str, label: str) -> str:
        """A figure, an equation or an exercise: its number, and a link to other chapters' ones."""
        if label not in targets():
            raise ValueError(f"{self.page}: nothing has the label {label!r}")
        target = targets()[label]
        if target.page == self.page:
            return f"{text} ({target.name})" if text else target.name
        anchor = f"equation-{label}" if target.kind == "equation" else label
        url = self.url(target.page, anchor)
        if text and not url:
            return f"{text} ({target.name})"
        return link(text or target.name, url)

    def citation(self, role: str, keys: str) -> str:
        """Authors and year, with a link to the work where the bibliography has its address."""
        cited = []
        for key in keys.split(","):
            entry = sources()[key.strip()]
            year, doi = entry.fields["year"], entry.fields.get("doi")
            url = entry.fields.get("url") or (f"https://doi.org/{doi}" if doi else "")
            name = authors(entry)
            if role == "cite:t":
                cited.append(f"{name} ({link(year, url)})")
            else:
                cited.append(link(f"{name}, {year}", url))
        return ", ".join(cited) if role == "cite:t" else f"({', '.join(cited)})"


def folded(summary: str, body: str) -> str:
    """Text that is shown after a click."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"
