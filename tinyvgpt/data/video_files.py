"""Which videos a folder holds, of which split and class.

A folder with train/, val/ or test/ holds splits, and what else is in it is left alone. Any other
folder is a training split itself. Where a split holds videos in sub-folders, the first sub-folder
on a video's path is its class; deeper ones are only places. Names that begin with a dot are
ignored, and so are sub-folders that hold a model or the log of a run, whose previews are no data.
Chapter 02 describes it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from tinyvgpt.data.windows import SPLITS

SUFFIXES = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")  # in any case
OF_A_RUN = {"log.jsonl", "vqvae.safetensors"}


@dataclass(frozen=True)
class VideoFiles:
    """The videos of a folder, as paths from it with "/" between, in order."""

    splits: dict[str, tuple[str, ...]]  # those of SPLITS that the folder has
    label_names: tuple[str, ...] | None  # the classes of all splits, or None without class folders
    depth: int  # parts of a path before the class: 1 where splits are folders, else 0

    @property
    def all(self) -> list[str]:
        """The videos of all splits."""
        return [name for names in self.splits.values() for name in names]

    def label(self, name: str) -> int:
        """Index into `label_names` of a video's class."""
        assert self.label_names is not None
        return self.label_names.index(name.split("/")[self.depth])


def find_videos(folder: Path) -> VideoFiles:
    """List the videos of a folder and of all folders in it.

    Raises:
        ValueError: the folder is missing, none, or may not be read; or some videos are in class
            folders and others not.
    """
    inside = {entry.name for entry in _entries(folder) if entry.is_dir()}
    places = {split: folder / split for split in SPLITS if split in inside}
    if places:
        splits = {
            split: tuple(sorted(f"{split}/{name}" for name in _videos_below(place)))
            for split, place in places.items()
        }
    else:
        splits = {"train": tuple(sorted(_videos_below(folder)))}
    depth = 1 if places else 0
    names = [name for videos in splits.values() for name in videos]
    return VideoFiles(splits, _classes(folder, names, depth), depth)


def _classes(folder: Path, names: list[str], depth: int) -> tuple[str, ...] | None:
    """Names of the class folders, in order; None if there are none."""
    classed = [name for name in names if name.count("/") > depth]
    classless = [name for name in names if name.count("/") == depth]
    if classed and classless:
        raise ValueError(
            f"{folder} has videos in class folders ({classed[0]}) and others in none "
            f"({classless[0]}); put all of them into class folders, or none"
        )
    return tuple(sorted({name.split("/")[depth] for name in classed})) if classed else None


def _videos_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> list[str]:
    """Videos in a folder and its sub-folders, but runs, as paths from it; links up are left out."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    found = []
    entries = _entries(folder)
    if above and not OF_A_RUN.isdisjoint(entry.name for entry in entries):
        return []
    for entry in entries:
        if entry.is_dir():
            below = _videos_below(Path(entry.path), (*above, here))
            found += [f"{entry.name}/{name}" for name in below]
        elif entry.name.lower().endswith(SUFFIXES):
            found.append(entry.name)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden; ValueError if that can't be told."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        raise ValueError(f"there is no folder {folder}") from None
    except NotADirectoryError:
        raise ValueError(f"{folder} is a file, a folder of videos is needed") from None
    except PermissionError:
        raise ValueError(f"folder {folder} may not be read: permission denied") from None
