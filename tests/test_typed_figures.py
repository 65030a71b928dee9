"""Times, speeds and sizes in prose are made by a cell, stand in a record, or are cited.

Prose is what no cell prints: README and the book's pages without their code. A paragraph or a row
of a table may have a figure of a machine if it cites a source or links the record where it stands.
"""

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("**/*.md"))]
NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNIT = (
    r"(?:[nµum]s|(?<=[ \u00a0])s|sec(?:ond)?s?|min(?:ute)?s?|hours?|days?)\b"
    r"|[kMGT]i?B(?:/s)?\b|[kMGT]?FLOP(?:S|/s)\b|[kMG]?Hz\b|W\b|watts?\b"
    r"|(?:clips|tokens|frames|steps|bytes|samples)(?: a |/| per )s(?:econd)?\b"
    r"|times (?:as fast|faster|slower|the speed)\b"
)
FIGURE = re.compile(rf"(?<![\w.,/-])({NUMBER})[ \u00a0-]?({UNIT})")
CITED = re.compile(r"\{cite|https://|\]\((?:\.\./)?(?:book/)?results/[\w-]+\.json\)")
EXERCISE = re.compile(r"^\*{1,2}(?:Easy|Medium|Hard|Project), \d+ minutes", re.MULTILINE)

# What the rule does not mean. Each is a figure as it stands on its page.
EXEMPT = {
    "film's own rate, chosen by those who film": {
        "01_clips.md": ["60 frames a second", "30 frames a second"],
        "02_datasets.md": ["24 frames a second"],
        "own_videos.md": ["8 frames a second", "30 frames a second"],
    },
    "the arithmetic stands beside it": {
        "02_datasets.md": ["65.5 GB", "2 MB"],
        "12_first_kernel.md": ["2 MB"],
    },
    "of data sheets that the paragraph below the table cites": {
        "12_first_kernel.md": ["50 MB", "60 MB", "80 GB", "141 GB"],
    },
    "size of a download, as its recipe states it": {
        "README.md": ["32 GB"],
        "02_datasets.md": ["32 GB"],
    },
    "an example, or a setting of the package": {
        "02_datasets.md": ["30 GB"],
        "many_gpus.md": ["120 seconds", "30 seconds"],
    },
    "the most that any chapter says it needs": {"teaching.md": ["4 GB"]},
}


def uncoded(text: str) -> str:
    """Text without fenced code; what stands in other directives, such as notes, stays."""
    kept, fences = [], []  # of the fences that are open: their ticks, whether they hold code
    for line in text.splitlines():
        found = re.match(r"(`{3,}|:{3,}|~{3,})(.*)", line)
        if found and fences and not found[2].strip() and found[1] == fences[-1][0]:
            fences.pop()
        elif found and not (fences and fences[-1][1]):
            directive = re.match(r"\{(?!code)", found[2].strip())
            fences.append((found[1], not directive))
        elif not (fences and fences[-1][1]):
            kept.append(line)
        if found:
            kept.append("")  # the paragraph ends
    return "\n".join(kept)


def prose(page: Path) -> Iterator[str]:
    """Paragraphs and rows of tables, without code, formulas and the metadata on top."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"(?<!\})`[^`\n]+`|\$\$[^$]+\$\$|\$[^$]+\$", "", uncoded(text))
    for block in re.split(r"\n\s*\n", text):
        yield from block.splitlines() if block.lstrip().startswith("|") else [block]


def typed(block: str) -> list[str]:
    """Figures of a machine in a block."""
    return [re.sub(r"\s", " ", found.group()) for found in FIGURE.finditer(block)]


def unfounded(page: Path) -> Iterator[str]:
    """Figures that no source, record or rule stands behind."""
    founded = False
    for block in prose(page):
        # "the same" in a table: the record of the row above
        founded = bool(CITED.search(block)) or (founded and "| the same" in block)
        # What a chapter needs is said roughly, after trying it; `make test` holds its time.
        if not (founded or EXERCISE.search(block) or block.startswith("**What you need")):
            yield from typed(block)


def exempt(page: Path) -> set[str]:
    return {figure for pages in EXEMPT.values() for figure in pages.get(page.name, [])}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_figures_have_a_source(page):
    assert set(unfounded(page)) == exempt(page)


def results() -> Iterator[tuple[str, set[Path]]]:
    """README's rows of results, and the records that each names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.split(r"^## ", text, flags=re.MULTILINE)
    rows = next(part for part in table if part.startswith("Results so far")).splitlines()
    records: set[Path] = set()
    for row in (row for row in rows if row.startswith("| ")):
        named = re.findall(r"\((book/results/[\w-]+\.json)\)", row)
        if named or "| the same" not in row:
            records = {ROOT / name for name in named}
        yield row, records


def values(found: object) -> Iterator[float]:
    """All numbers of a record."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        for part in found:
            yield from values(part)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield float(found)


def stands(typed: str, recorded: set[float]) -> bool:
    """Whether a record has the number, rounded as it is typed, in s, ms or µs."""
    digits = typed.replace(",", "")
    half = 0.5001 * 10 ** -len(digits.partition(".")[2])
    return any(
        abs(value * scale - float(digits)) <= half
        for value, scale in product(recorded, (1, 1e3, 1e6))
    )


def test_readme_s_results_stand_in_their_records():
    checked = 0
    for row, records in results():
        recorded = {v for path in records for v in values(json.loads(path.read_text("utf-8")))}
        # of "7,417; 58,018; 78,622 tokens a second" all three
        pattern = rf"((?:{NUMBER}(?:; | and ))*{NUMBER}) (?:ms|s|(?:tokens|clips) a second)\b"
        for numbers in re.findall(pattern, row.replace("0.15 and 0.17", "0.15; 0.17")):
            for number in re.findall(NUMBER, numbers):
                assert stands(number, recorded), f"{number} is in no record of: {row}"
                checked += 1
    assert checked >= 12


@pytest.mark.parametrize(
    ("sentence", "figures"),
    [
        ("A step takes 28.2 ms, or 3 s.", ["28.2 ms", "3 s"]),
        ("It draws 1,234 tokens/s, 3.5 times as fast.", ["1,234 tokens/s", "3.5 times as fast"]),
        ("Links carry 900 GB/s {cite}`nvidia`.", []),
        ("It is 12 µs ([record](results/kernels.json)).", []),
        ("Two 3s, 16 frames and 4 FLOP each", []),
        ("`sleep 3 s`", []),
    ],
)
def test_what_counts_as_a_figure(tmp_path, sentence, figures):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{sentence}\n", encoding="utf-8")
    assert list(unfounded(page)) == figures
