"""An exercise's check refuses what is unsolved and what is wrong, and says why.

Each chapter's cells run in order, as in a notebook. A cell tagged raises-exception checks the stub
that the reader is given. The solutions run with the other cells, and with them their checks.
"""

from pathlib import Path

import jupytext
import pytest

BOOK = Path(__file__).parents[1] / "book"

# For each check: a wrong answer that a reader may well give, and what the check must say to it.
WRONG = {
    "01_clips": {
        "check_weight": (
            "lambda hours, height, width, channels, fps: hours * 3600 * fps * height * width / 1e9",
            "447.898, 1343.6928 is right: multiply by 3",
        ),
        "check_ping_pong": (
            "lambda clip: torch.cat([clip, clip.flip(0)])",
            "frame 4 comes twice in a row",
        ),
        "check_on_screen": (
            "lambda times, fps, start, count: [\n"
            "    (times - start - n / fps).abs().argmin() for n in range(count)\n"
            "]",
            r"frames at 0, 1, 2, 3 s: .* yours shows \[0, 1, 1, .*\], \[0, 0, 1, .*\] is on screen",
        ),
        "check_smooth_matrix": ("resize_matrix", "72 → 32: new pixel .* of old pixel .* is right"),
        "check_motion": (
            "lambda before, after: before",
            "block .* is off by .*: a better one is in reach",
        ),
    },
    "own_videos": {
        "check_clips_in": (
            "lambda seconds, fps, frames, stride: sum(int(s * fps) // frames for s in seconds)",
            "is 1, 5 is right",
        ),
        "check_find_broken": (
            "lambda folder: [p.name for p in sorted(folder.iterdir()) if not p.stat().st_size]",
            r"d\.mp4 is missing in your list",
        ),
        "check_find_cuts": (
            "lambda film: (\n"
            "    (film[1:].float() - film[:-1].float()).abs().mean((1, 2, 3)) > 1\n"
            ").nonzero()[:, 0] + 1",
            "a film without a cut: yours are",
        ),
    },
}


@pytest.fixture(scope="module", params=WRONG)
def chapter(request, tmp_path_factory):
    """The chapter's name, what its cells have defined, and what its checks said to the stubs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYVGPT_BUDGET", "smoke")
        patch.setenv("MPLBACKEND", "agg")
        patch.chdir(tmp_path_factory.mktemp(request.param))
        names, said = {}, {}
        for cell in jupytext.read(BOOK / f"{request.param}.md").cells:
            if cell.cell_type != "code":
                continue
            if "raises-exception" in cell.metadata.get("tags", []):
                with pytest.raises(AssertionError) as refusal:
                    exec(cell.source, names)
                said[cell.source.partition("(")[0]] = str(refusal.value)
            else:
                exec(cell.source, names)
        yield request.param, names, said


def test_an_unsolved_exercise_is_told_so(chapter):
    name, _, said = chapter
    assert said.keys() == WRONG[name].keys()
    for message in said.values():
        assert "returns nothing yet" in message


def test_a_wrong_answer_is_told_what_is_wrong(chapter):
    name, names, _ = chapter
    for check, (answer, message) in WRONG[name].items():
        with pytest.raises(AssertionError, match=message):
            names[check](eval(answer, names))
