"""What figures, equations, exercises and sources are called: the numbers that the site gives them.

Figures, exercises and labelled equations are counted by chapter, in the order of _toc.yml.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jupytext
import yaml
from addresses import ROOT
from directives import pieces
from pybtex.database import Entry, parse_file

EQUATION = re.compile(r"^\$\$ \((\S+)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """Something that has a label."""

    page: str  # a source without its ending, such as book/01_clips
    kind: str  # "figure", "equation" or "exercise"
    number: str  # such as 1.2
    title: str = ""

    @property
    def name(self) -> str:
        """How a text names it."""
        forms = {"figure": "Fig. {}", "equation": "({})", "exercise": "Exercise {}"}
        return forms[self.kind].format(self.number)


def pages() -> Iterator[tuple[str, str]]:
    """Every page of _toc.yml with its chapter's number, "" if it has none."""
    toc, number = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")), 0
    yield toc["root"], ""
    for part in toc["parts"]:
        for entry in part["chapters"]:
            number += bool(part.get("numbered"))
            yield entry["file"], str(number) if part.get("numbered") else ""
            yield from ((section["file"], "") for section in entry.get("sections", []))


@cache
def with_code() -> list[Path]:
    """Sources of the chapters, and of other pages whose code is made to be run."""
    paths = [ROOT / f"{page}.md" for page, _ in pages()]
    header = "\nkernelspec:\n"
    return [p for p in paths if re.match(r"\d\d_|own_videos", p.name) and header in text(p)]


@cache
def text(path: Path) -> str:
    """A source as it stands."""
    return path.read_text(encoding="utf-8")


def title(page: str) -> str:
    """A page's first heading."""
    return re.search(r"^# (.+)$", text(ROOT / f"{page}.md"), re.MULTILINE)[1]


def labelled(path: Path) -> Iterator[tuple[str, str, str]]:
    """A chapter's figures, equations and exercises in order: kind, label, title."""
    for cell in jupytext.reads(text(path), fmt="md:myst").cells:
        if cell.cell_type == "code":
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            if "caption" in figure:
                yield "figure", figure.get("name", ""), ""
            continue
        for directive, source in pieces(cell.source):
            if directive is None:
                yield from (("equation", label, "") for label in EQUATION.findall(source))
            elif directive.name == "figure" and directive.body.strip():
                yield "figure", directive.options.get("name", ""), ""
            elif directive.name in ("exercise-start", "exercise"):
                yield "exercise", directive.options.get("label", ""), directive.argument


@cache
def targets() -> dict[str, Target]:
    """All labels of the pages that have code."""
    found, numbers = {}, dict(pages())
    for path in with_code():
        page = path.relative_to(ROOT).with_suffix("").as_posix()
        chapter = f"{numbers[page]}." if numbers[page] else ""
        counted: Counter[str] = Counter()
        for kind, label, heading in labelled(path):
            counted[kind] += 1
            found[label] = Target(page, kind, f"{chapter}{counted[kind]}", heading)
    return found


@cache
def sources() -> dict[str, Entry]:
    """The bibliography by keys."""
    return parse_file(str(ROOT / "book" / "references.bib")).entries


def authors(entry: Entry) -> str:
    """Last names: one, two, or the first and "et al."."""
    people = entry.persons.get("author") or entry.persons["editor"]
    names = [" ".join([*p.prelast_names, *p.last_names]) for p in people]
    names = [re.sub(r"[{}]", "", name) for name in names]
    return f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
