"""UCF101 (Soomro, Zamir & Shah 2012, arXiv 1212.0402): 13,320 videos of 101 actions, in folders.

    python data_recipes/ucf101.py --out ucf101
    python data_recipes/ucf101.py --out ucf101-split2 --split 2

fetches the videos (6.9 GB, a .rar) and the three official splits, and makes `OUT/train/CLASS/*.avi`
and `OUT/test/CLASS/*.avi` of one of them, which `open_dataset("OUT")` reads. What is fetched and
unpacked stays in the folder of --downloads: the next split is made of it, by hard links, in
seconds. Run it again after any interruption: each step goes on where it was or begins anew.

`--archive UCF101.rar --splits UCF101TrainTestSplits-RecognitionTask.zip` takes files that you have,
for instance because a browser trusts the university's certificate and Python doesn't.
"""

import argparse
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import archives
import rar
from fetch import Source, check_space, fetch
from recipe import run
from tqdm import tqdm

VIDEOS = (  # where the videos lie, and when somebody last fetched them from there
    Source("https://www.crcv.ucf.edu/data/UCF101/UCF101.rar", verified="never"),
    Source("https://www.crcv.ucf.edu/datasets/human-actions/ucf101/UCF101.rar", verified="never"),
)
LISTS = (
    Source(
        "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",
        verified="never",
    ),
    Source(
        "https://www.crcv.ucf.edu/wp-content/uploads/2019/03/"
        "UCF101TrainTestSplits-RecognitionTask.zip",
        verified="never",
    ),
)
SIZE = 6_932_971_618  # bytes of UCF101.rar, as those who fetched it report; no checksum is known
UNPACKED = 7_200_000_000  # bytes, at most: the videos are compressed already
LARGEST_LIST = 10_000_000  # bytes; the real ones have half a million
LINE = re.compile(r"([^/\\]+)/([^/\\]+\.avi)(?: +\d+)?")  # class/video.avi, its class's number

Lists = dict[str, dict[str, str]]  # split → "Class/video.avi" of each video → its class


def read_lists(path: Path, split: int) -> Lists:
    """The official split's training and test videos, by `train` and `test`.

    Args:
        path: the zip of trainlist01.txt … testlist03.txt, in any folder of it.
        split: 1, 2 or 3.

    Raises:
        ValueError: the zip is damaged, a list is missing or has another form, or the two overlap.
    """
    lists = {}
    try:
        with zipfile.ZipFile(path) as file:
            for part in ("train", "test"):
                name = f"{part}list{split:02}.txt"
                found = [m for m in file.infolist() if m.filename.rsplit("/")[-1] == name]
                if len(found) != 1 or found[0].file_size > LARGEST_LIST:
                    raise ValueError(f"{path} should have one {name}, it has {len(found)}")
                lists[part] = _read_list(file.read(found[0]).decode(), f"{path}: {name}")
    except archives.UNREADABLE as error:
        raise ValueError(f"{path} is damaged or no zip file: {error}") from None
    if both := lists["train"].keys() & lists["test"].keys():
        raise ValueError(f"{path} has {min(both)} in both lists of split {split}")
    return lists


def _read_list(text: str, where: str) -> dict[str, str]:
    """Videos of a list, each with its class."""
    videos = {}
    for number, line in enumerate(text.splitlines(), 1):
        found = LINE.fullmatch(line.strip())
        if line.strip() and not found:
            raise ValueError(f"{where}, line {number} is {line.strip()!r:.80}, not Class/video.avi")
        if found:
            archives.check_name(f"{found[1]}/{found[2]}", Path(where))
            videos[f"{found[1]}/{found[2]}"] = found[1]
    if not videos:
        raise ValueError(f"{where} is empty")
    return videos


def videos_in(folder: Path) -> dict[str, Path]:
    """The .avi files below a folder, by their names in lower case.

    The class is in a video's name. Letter case differs between the lists and the archive for some.
    """
    found = {}
    for path in sorted(folder.rglob("*.avi")):
        key = path.name.lower()
        if key in found:
            raise ValueError(f"{path.name} is there twice: {found[key]} and {path}")
        found[key] = path
    return found


def arrange(out: Path, lists: Lists, videos: dict[str, Path]) -> None:
    """Makes OUT/train/CLASS/ and OUT/test/CLASS/ of hard links; OUT appears when it is complete.

    Raises:
        ValueError: none of the lists' videos is there.
        OSError: too little space, where the file system has no hard links; or OUT can't be made.
    """
    wanted = {key for part in lists.values() for key in part}
    missing = sorted(key for key in wanted if _name(key) not in videos)
    extra = sorted(videos.keys() - {_name(key) for key in wanted})
    if len(missing) == len(wanted):
        raise ValueError(f"none of the {len(wanted)} videos that the lists name is there")
    _report(missing, "videos of the lists are missing, they are left out")
    _report([videos[key].name for key in extra], "videos are in no list, they are left out")
    arranging = out.with_name(f".{out.name}.arranging")
    shutil.rmtree(arranging, ignore_errors=True)
    for part, keys in lists.items():
        (arranging / part).mkdir(parents=True)
        for key in tqdm(sorted(keys.keys() - set(missing)), desc=part, unit="video"):
            place = arranging / part / key
            place.parent.mkdir(exist_ok=True)
            _link(videos[_name(key)], place)
    os.replace(arranging, out)


def is_arranged(out: Path, lists: Lists) -> bool:
    """Whether OUT is this split already, but for videos that may be missing.

    Raises:
        ValueError: OUT is something else.
    """
    if not out.exists():
        return False
    if not out.is_dir() or not (entries := set(os.listdir(out))):
        raise ValueError(f"{out} is {'empty' if out.is_dir() else 'no folder'}: remove it first")
    for part, keys in lists.items():
        there = {path.relative_to(out / part).as_posix() for path in (out / part).glob("*/*.avi")}
        if not there or not there <= keys.keys() or not entries >= lists.keys():
            raise ValueError(
                f"{out} exists and is not the split that was asked for: choose another --out"
            )
    return True


def _name(key: str) -> str:
    """The key in `videos_in` of a list's video."""
    return key.rsplit("/")[-1].lower()


def _link(source: Path, place: Path) -> None:
    """A second name for a file; a copy, where the file system has no hard links."""
    try:
        os.link(source, place)
    except OSError:
        check_space(place.parent, source.stat().st_size, place.name)
        shutil.copyfile(source, place)


def _report(names: Sequence[str], what: str, most: int = 5) -> None:
    if names:
        shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
        print(f"{len(names)} {what}: {shown}", file=sys.stderr)


def check_needs(archive: Path | None, downloads: Path, out: Path) -> None:
    """Raises before anything is fetched if a tool, space or a permission is missing for the rest.

    Raises:
        ValueError: no tool, or no archive.
        OSError: too little space, or a folder that can't be written.
    """
    for folder in (downloads, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} can't be written: permission denied")
    rar_at = archive or downloads / "UCF101.rar"
    if _unpacked_folder(archive, downloads).is_dir():
        return
    if not rar_at.is_file():
        if archive:
            raise ValueError(f"there is no file {archive}")
        rar.find_tool()
        partial = rar_at.with_name(f".{rar_at.name}.partial")
        come = partial.stat().st_size if partial.is_file() else 0
        check_space(downloads, SIZE - come + UNPACKED, "UCF101, 6.9 GB packed and unpacked,")
    elif archives.kind_of(rar_at) == "rar":
        rar.find_tool()


def _unpacked_folder(archive: Path | None, downloads: Path) -> Path:
    """Where an archive is unpacked: a folder for each one, by its name and its size."""
    size = archive.stat().st_size if archive and archive.is_file() else SIZE
    return downloads / f"{archive.stem if archive else 'UCF101'}-{size}"


def main() -> None:
    """Fetches, unpacks, arranges: whatever of it is still to be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="official split")
    parser.add_argument("--archive", type=Path, help="UCF101.rar, if you have it")
    parser.add_argument("--splits", type=Path, help="the zip of the splits, if you have it")
    parser.add_argument(
        "--downloads", type=Path, help="for what is fetched and unpacked; OUT-downloads unless told"
    )
    options = parser.parse_args()
    out = options.out.absolute()
    downloads = (options.downloads or out.with_name(f"{out.name}-downloads")).absolute()
    have_lists = options.splits or downloads / "UCF101TrainTestSplits-RecognitionTask.zip"
    if not out.exists():
        check_needs(options.archive, downloads, out)
    if not options.splits:
        fetch(LISTS, have_lists)
    lists = read_lists(have_lists, options.split)
    if not is_arranged(out, lists):
        unpacked = _unpacked_folder(options.archive, downloads)
        if not unpacked.is_dir():
            archive = options.archive or fetch(VIDEOS, downloads / "UCF101.rar", size=SIZE)
            archives.extract(archive, unpacked)
        arrange(out, lists, videos_in(unpacked))
    for part, keys in lists.items():
        there = len(list((out / part).glob("*/*.avi")))
        print(f"{options.out / part}: {there} of the {len(keys)} videos of split {options.split}")


if __name__ == "__main__":
    run(main)
