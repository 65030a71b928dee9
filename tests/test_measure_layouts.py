"""The measurement of HDF5 layouts: what it writes and reads, and that it leaves nothing behind."""

import sys

import h5py
import measure_layouts
import numpy as np
import pytest


@pytest.mark.parametrize("layout", measure_layouts.LAYOUTS)
def test_all_layouts_hold_the_same_frames(layout, tmp_path):
    for name in (layout, "contiguous"):
        measure_layouts.write(tmp_path / name, 2, name)
    with h5py.File(tmp_path / layout) as file, h5py.File(tmp_path / "contiguous") as contiguous:
        data = file["data"]
        assert data.shape == (60, 64, 64, 3)
        chunks, compression = measure_layouts.LAYOUTS[layout]
        assert data.compression == compression
        assert data.chunks == chunks if chunks is not True else data.chunks is not None
        np.testing.assert_array_equal(data[()], contiguous["data"][()])
        assert len(np.unique(data[()].reshape(60, -1), axis=0)) == 60


def test_one_line_a_layout(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "files", tmp_path / "results"
    folder.mkdir()
    arguments = ["--folder", str(folder), "--videos", "3", "--out", str(out)]
    arguments.insert(0, "measure_layouts.py")
    monkeypatch.setattr(sys, "argv", arguments)
    measure_layouts.main()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["layout", "cold", "warm"]
    assert [line[:20].strip() for line in lines] == list(measure_layouts.LAYOUTS)
    assert all(int(rate.replace(",", "")) > 0 for line in lines for rate in line[20:].split())
    assert not list(folder.iterdir())
    assert [path.name for path in out.iterdir()] == ["hdf5-layouts.json"]
