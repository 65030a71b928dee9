"""tinyvgpt.notebook: the budget, the check against the package, the figures' look."""

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
