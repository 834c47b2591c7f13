"""What lies where in a folder of data.

Files and pictures, and the splits that names of files and folders tell.
"""

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from xlvlms_tutorial.errors import AnnotationError
from xlvlms_tutorial.io import file_digest

SPLITS = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "testdev": "test",
}
LEVELS = 2  # of folders below the folder itself
DATA = (".json", ".jsonl", ".csv")
PICTURES = (".jpg", ".png", ".jpeg", ".webp")
_NAMED = re.compile(
    r"(?<![a-z])(test[-_ "
    r"]?dev|train(?:ing)?|restval|val(?:id(?:ation)?)?|dev|test(?:ing)?)(?:set|split)?(?![a-z])"
)


@lru_cache(maxsize=1024)
def named_split(name: str) -> str | None:
    """Return the split that one name tells: "captions_val2017" and "valid" are of validation.

    A name with two splits tells none.
    """
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    splits = set()
    for word in _NAMED.findall(plain):
        joined = re.sub("[-_ ]", "", word)
        splits.add(SPLITS[joined])
    return splits.pop() if len(splits) == 1 else None


def folder_split(file: str) -> str | None:
    """Return the split that the folders of a file tell, the nearest first."""
    for name in reversed(file.split("/")[:-1]):
        if split := named_split(name):
            return split
    return None


def inside(file: object, name: str) -> str:
    """Return a file name in its plain form.

    Raises
    ------
    AnnotationError
        If it leaves the folder.
    """
    plain = posixpath.normpath(name.replace("\\", "/"))
    if posixpath.isabs(plain) or plain.split("/")[0] == ".." or re.match(r"[A-Za-z]:", plain):
        raise AnnotationError(
            f"{file}: the picture {name[:200]!r} is outside of the folder",
            "give paths below the folder",
        )
    return plain


def listing(folder: Path) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """List the folder and its folders, two levels down, each with the names in it.

    The folder is read again where this changes.
    """
    folders_in = []
    for path, folders, files in os.walk(folder, followlinks=True):
        below = os.path.relpath(path, folder).replace(os.sep, "/").removeprefix(".")
        folders_in.append((f"{below}/" if below else "", tuple(sorted(folders + files))))
        if below.count("/") + bool(below) < LEVELS:
            folders[:] = sorted(name for name in folders if not hidden(name))
        else:
            folders.clear()  # the walk goes no deeper
    return tuple(folders_in)


def hidden(name: str) -> bool:
    """Return whether a name is one that systems and editors make for themselves.

    "._captions.json", ".ipynb_checkpoints", "__MACOSX".
    """
    return name.startswith(".") or name == "__MACOSX"


class Tree:
    """Find the pictures of a folder by the names that annotations call them."""

    def __init__(self, folder: Path, listed: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        self.folder = folder
        self.places: dict[str, list[str]] = defaultdict(list)
        for place, names in listed:
            for name in names:
                if not hidden(name):
                    self.places[name].append(place)
        self.splits = {folder_split(place) for place, _ in listed} - {None}
        self.contents: dict[str, object] = {}
        self.pictures = set()
        for name, places in self.places.items():
            if name.lower().endswith(PICTURES):
                for place in places:
                    self.pictures.add(f"{place}{name}")

    def picture(self, file: str, name: str, split: str | None) -> str | None:
        """Return the path of a picture that a file calls by a name, None where there is none.

        Of several, it is the one beside the file, else the one in a folder of the split, else the
        one that the name says from the folder.

        Parameters
        ----------
        file : str
            The file of annotations, from the folder.
        name : str
            The picture's name in that file.
        split : str or None
            The split that the file or the entry tells.

        Raises
        ------
        AnnotationError
            If several pictures that differ are left.
        """
        paths = []
        for place in self.places.get(name.partition("/")[0], ()):
            path = f"{place}{name}"
            # False too for names that no system takes
            if os.path.isfile(self.folder / path):
                paths.append(path)
        beside = posixpath.join(posixpath.dirname(file), name)
        if beside in paths:
            return beside
        if len(paths) < 2:
            return paths[0] if paths else None
        if split:
            of_split = [path for path in paths if folder_split(path) == split]
            paths = of_split or paths
        if name in paths:
            return name
        first = paths[0]
        for path in paths[1:]:
            if not self.same(first, path):
                message = f"{file}: {name!r} may be {first} or {path}, which are different pictures"
                raise AnnotationError(message, "give the path of each from the folder")
        return first

    def apart(self, path: str, split: str | None) -> bool:
        """Return whether a picture is in another split's folder while this split has one."""
        return folder_split(path) not in (None, split) and split in self.splits

    def same(self, a: str, b: str) -> bool:
        """Return whether two pictures are one, byte by byte."""
        return self.content(a) == self.content(b)

    def size(self, path: str) -> int:
        """Return the size of a file in bytes, -1 if it is gone."""
        try:
            return os.path.getsize(self.folder / path)
        except OSError:
            return -1

    def content(self, path: str) -> object:
        """Return what two files have in common if they hold the same: their digest, made once.

        Of a file that cannot be read, its path.
        """
        if path not in self.contents:
            try:
                self.contents[path] = file_digest(self.folder / path)
            except OSError:
                self.contents[path] = path
        return self.contents[path]
