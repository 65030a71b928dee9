"""tinyvgpt.notebook: the budget, the check against the package, the figures' look."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyvgpt import notebook


@pytest.mark.parametrize(("name", "chosen"), [("smoke", 1), ("cpu", 2), ("gpu", 3)])
def test_budget_follows_the_environment(monkeypatch, name, chosen):
    monkeypatch.setenv("TINYVGPT_BUDGET", name)
    assert notebook.budget(smoke=1, cpu=2, gpu=3) == chosen


@pytest.mark.parametrize(("cuda", "chosen"), [(True, "gpu"), (False, "cpu")])
@pytest.mark.parametrize("unset", [None, ""])
def test_budget_follows_the_device_without_it(monkeypatch, cuda, chosen, unset):
    if unset is None:
        monkeypatch.delenv("TINYVGPT_BUDGET", raising=False)
    else:
        monkeypatch.setenv("TINYVGPT_BUDGET", unset)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert notebook.budget_name() == chosen


def test_budget_refuses_an_unknown_name(monkeypatch):
    monkeypatch.setenv("TINYVGPT_BUDGET", "huge")
    with pytest.raises(ValueError, match="TINYVGPT_BUDGET is 'huge', it can be smoke, cpu, gpu"):
        notebook.budget(smoke=1, cpu=2, gpu=3)


def test_versions_prints_one_line_each(capsys, monkeypatch):
    monkeypatch.setenv("TINYVGPT_BUDGET", "smoke")
    notebook.versions()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "python",
        "torch",
        "tinyvgpt",
        "device",
        "budget",
    ]
    assert lines[1].split()[1] == torch.__version__
    assert lines[4].split()[1] == "smoke"


@pytest.mark.parametrize(("threads", "said"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_versions_counts_threads(capsys, monkeypatch, threads, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    notebook.versions()
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split(maxsplit=1)[1] == said


@pytest.mark.parametrize(
    ("yours", "package"),
    [
        (torch.arange(6).reshape(2, 3), np.arange(6, dtype=np.uint8).reshape(2, 3)),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), [1, 1]),
        (torch.tensor([0.5, -torch.inf]), torch.tensor([0.5, -torch.inf])),
        (3, 3.0),
    ],
)
def test_check_says_equal(capsys, yours, package):
    notebook.check("tokens", yours, package)
    assert capsys.readouterr().out.startswith("✓ tokens: equal (")


def test_check_prints_the_largest_difference(capsys):
    notebook.check("scores", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.25]), atol=0.25)
    assert capsys.readouterr().out == "✓ scores: largest difference 2.5e-01 (2 values)\n"


@pytest.mark.parametrize(
    ("yours", "package", "message"),
    [
        # uint8 must not wrap around: 0 - 255 is a difference of 255.
        (
            np.uint8([[0, 7]]),
            np.uint8([[255, 7]]),
            r"clip: yours is 0, the package's 255 at index \(0, 0\); .* 255, more than 0.5",
        ),
        (1.0, 2.0, r"yours is 1, the package's 2 at index \(\)"),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), "yours is nan"),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "yours is inf"),
        (torch.zeros(2, 1), torch.zeros(1, 2), r"shape \(2, 1\), the package's \(1, 2\)"),
        (torch.zeros(0), torch.zeros(0), "nothing to compare"),
    ],
)
def test_check_fails_with_both_values(capsys, yours, package, message):
    with pytest.raises(AssertionError, match=message):
        notebook.check("clip", yours, package, atol=0.5)
    assert capsys.readouterr().out == ""


def test_style_draws_one_pixel_as_one_square_on_a_white_card():
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        notebook.style()
        canvas = FigureCanvasAgg(Figure(layout="none"))
        axes = canvas.figure.add_axes((0.25, 0.25, 0.5, 0.5))
        axes.set_axis_off()
        axes.imshow([[0, 1], [1, 0]], aspect="auto")
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    height, width = pixels.shape[:2]
    assert set(np.unique(pixels)) == {0, 255}
    assert pixels[: height // 4 - 1].min() == 255
    assert pixels[height // 4 + 1 : height // 2 - 1, width // 4 + 1 : width // 2 - 1].max() == 0


def test_check_compares_python_floats_in_double_precision():
    with pytest.raises(AssertionError):
        notebook.check("thirds", [1 / 3], [1 / 3 + 1e-12])


@pytest.fixture
def pictures(monkeypatch):
    """Four pictures (4, 6, 10, 3) of noise, shown as a live notebook shows them."""
    monkeypatch.delenv("TINYVGPT_BOOK_MEDIA", raising=False)
    monkeypatch.delenv("TINYVGPT_BOOK_MEDIA_URL", raising=False)
    return np.random.default_rng(0).integers(0, 256, (4, 6, 10, 3), dtype=np.uint8)


def elements(player, name):
    """Attributes of the elements with this name, in order."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == name:
                found.append(dict(attributes))

    Parser().feed(player._repr_html_())
    return found


def decoded(address):
    image = pytest.importorskip("PIL.Image")
    prefix = "data:image/webp;base64,"
    assert address.startswith(prefix)
    with image.open(io.BytesIO(base64.b64decode(address.removeprefix(prefix)))) as opened:
        return np.asarray(opened)


@pytest.mark.parametrize("channels", [3, 1])
def test_step_through_holds_every_picture_losslessly(pictures, channels):
    pictures = pictures[..., :channels]
    player = notebook.step_through(torch.from_numpy(pictures), alt="noise", scale=4)
    images = elements(player, "img")
    for image, picture in zip(images, pictures, strict=True):
        assert np.array_equal(decoded(image["src"]), np.broadcast_to(picture, (6, 10, 3)))
        assert (image["width"], image["height"], image["alt"]) == ("40", "24", "noise")
        assert "pixelated" in image["style"]
    assert repr(player) == "<4 pictures of 10×6 pixels to step through>"


def test_step_through_shows_the_first_picture_and_offers_the_others(pictures):
    captions = ["<b>", "2 & 3", '"', "end"]
    player = notebook.step_through(pictures, captions, alt='a "film"', fps=8)
    steps = [each for each in elements(player, "div") if each.get("class") == "step"]
    assert ["hidden" in step for step in steps] == [False, True, True, True]
    (bar,) = elements(player, "input")
    assert (bar["type"], bar["min"], bar["max"], bar["value"]) == ("range", "0", "3", "0")
    (button,) = elements(player, "button")
    assert "125" in button["onclick"]  # milliseconds
    assert [image["alt"] for image in elements(player, "img")] == [
        f'a "film", {caption}' for caption in captions
    ]
    assert "<b>" not in player.html
    assert "<script" not in player.html


def test_step_through_writes_files_while_the_book_is_built(pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYVGPT_BOOK_MEDIA", str(tmp_path / "media"))
    monkeypatch.setenv("TINYVGPT_BOOK_MEDIA_URL", "../media")
    player = notebook.step_through([*pictures, pictures[0]], alt="noise")
    sources = [image["src"] for image in elements(player, "img")]
    assert sources[0] == sources[4]
    assert {f"../media/{path.name}" for path in (tmp_path / "media").iterdir()} == set(sources)
    assert len(player.html) < 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": np.zeros((0, 2, 2, 3), np.uint8)}, "shapes .*, one or more of one is needed"),
        ({"pictures": [np.zeros((2, 2, 3)), np.zeros((2, 3, 3))]}, r"\(2, 2, 3\), \(2, 3, 3\)"),
        ({"pictures": np.zeros((1, 2, 2, 3))}, r"float64 \(2, 2, 3\), uint8 \(H, W, 1 or 3\)"),
        ({"pictures": np.zeros((1, 2, 2, 4), np.uint8)}, r"\(2, 2, 4\), uint8 \(H, W, 1 or 3\)"),
        ({"captions": ["one"]}, "1 captions for 4 pictures"),
        ({"fps": 0}, "fps is 0, it must be above 0"),
        ({"scale": -1}, "scale is -1, it must be above 0"),
    ],
)
def test_step_through_refuses_what_it_cannot_show(pictures, change, message):
    arguments = {"pictures": pictures, "alt": "noise", **change}
    with pytest.raises(ValueError, match=message):
        notebook.step_through(**arguments)


def test_picture_is_what_a_figure_shows_and_closes_it():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = pyplot.figure(figsize=(3, 2), dpi=10, facecolor="#ff0000")
    pixels = notebook.picture(figure)
    assert (pixels.shape, pixels.dtype) == ((20, 30, 3), np.uint8)
    assert (pixels == (255, 0, 0)).all()
    assert not pyplot.fignum_exists(figure.number)


def test_recorded_reads_the_books_records_where_they_are():
    results = Path(__file__).parents[1] / "book" / "results"
    names = [path.stem for path in results.glob("*.json")]
    if not names:
        pytest.skip("no repository around")
    for name in names:
        assert notebook.recorded(name) == json.loads((results / f"{name}.json").read_bytes())
    assert notebook.recorded("no-such-record") is None


def test_colours_of_codes_are_alike_where_codes_are():
    codes = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    codes = torch.cat([codes, codes + 1e-3])  # each twice, nearly
    colours = notebook.code_colours(codes).int()
    assert colours.shape == (128, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) > 100
    twins = (colours[:64] - colours[64:]).abs().float().mean()
    others = (colours[:64] - colours[64:].roll(1, 0)).abs().float().mean()
    assert twins < 5 < 40 < others
    assert colours.amin(0).tolist() == [40] * 3
    assert colours.amax(0).tolist() == [255] * 3


def test_light_falls_where_weights_are():
    clip = torch.full((4, 8, 8, 1), 100, dtype=torch.uint8)
    weights = torch.zeros(2, 4, 4)
    weights[1, 0, 3], weights[0, 2, 0] = 0.5, 0.25
    found = notebook.lit(clip, weights)
    assert found.dtype == torch.uint8
    assert found.shape == (4, 8, 8, 3)
    changed = (found != 100).any(-1)
    assert changed[2:, :2, 6:].all()
    assert changed[:2, 4:6, :2].all()
    assert changed.sum() == 2 * 2 * 2 * 2
    assert found[3, 0, 7].tolist() == [210, 150, 15]  # 0.15 · 100 + 0.85 · orange
    assert found[0, 4, 0].tolist() == [155, 125, 58]
    with pytest.raises(ValueError, match="don't divide"):
        notebook.lit(clip, torch.zeros(3, 4, 4))
