"""Finds the directives in a cell of MyST Markdown: fences whose info begins with {name}."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from markdown_it import MarkdownIt
from mdit_py_plugins.colon_fence import colon_fence_plugin

FENCES = MarkdownIt("commonmark").use(colon_fence_plugin)


@dataclass(frozen=True)
class Directive:
    """One fence, taken apart."""

    name: str
    argument: str  # what follows the name
    options: dict[str, str]
    body: str


def directive(info: str, content: str) -> Directive:
    """Takes a fence apart; options are the first lines of the form `:key: value`."""
    name, argument = re.fullmatch(r"\{([\w:-]+)\}\s*(.*)", info.strip()).groups()
    lines, options = content.splitlines(), {}
    while lines and (found := re.fullmatch(r":([\w-]+):\s*(.*)", lines[0])):
        value = found[2]
        options[found[1]] = yaml.safe_load(value) if value[:1] in "'\"" and value else value
        del lines[0]
    return Directive(name, argument, options, "\n".join(lines).strip("\n"))


def pieces(source: str) -> Iterator[tuple[Directive | None, str]]:
    """A cell in order, in pieces: each directive, and the text (with no directive) in between.

    Ordinary fences of code are part of no text: they come as pieces of their own, with the
    directive `code`, whose body is the fence as it stands.
    """
    lines, last = source.split("\n"), 0
    for token in FENCES.parse(source):
        if token.type not in ("fence", "colon_fence") or token.level:
            continue
        start, end = token.map
        yield None, "\n".join(lines[last:start])
        fence = "\n".join(lines[start:end])
        is_directive = token.info.strip().startswith("{")
        found = directive(token.info, token.content) if is_directive else None
        yield found or Directive("code", "", {}, fence), fence
        last = end
    yield None, "\n".join(lines[last:])
