"""What the files of a folder say together.

Which entries are of one picture, one box, one question, and of which split.
"""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from xlvlms_tutorial.data.annotations import Record
from xlvlms_tutorial.data.tree import PICTURES, Tree, folder_split, inside
from xlvlms_tutorial.errors import AnnotationError
from xlvlms_tutorial.samples import Question

# who tells a split: a file that gives ids alone, a file that lists pictures, the entry itself
BY_ID, BY_FILE, BY_ENTRY = 1, 2, 3


@dataclass
class Picture(Record):
    """The record of one picture, with what told its split."""

    there: bool = True
    rank: int = 0
    teller: object = None


@dataclass
class Part:
    """What one file gave: how much was taken and left, and why where nothing could be taken."""

    file: str  # from the folder
    path: str
    split: str | None = None
    form: str = ""
    taken: Counter = field(default_factory=Counter)
    left: Counter = field(default_factory=Counter)
    reason: str = ""
    quiet: bool = False  # nobody meant it for data
    pictures: dict[int, Picture] = field(default_factory=dict)
    boxes: dict[tuple, set] = field(default_factory=lambda: defaultdict(set))

    def __str__(self) -> str:
        return self.path

    @property
    def why(self) -> str:
        """The reason in few words: without the path, and without the list of forms."""
        return self.reason.replace(self.path, "").partition("; known forms")[0].strip(" :.")


class Gathered:
    """The pictures of a folder.

    One picture is one file: ids may start anew in each file, and one file may have several ids.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.parts: list[Part] = []
        self.pictures: list[Picture] = []
        self.names: dict[str, None] = {}
        self.by_place: dict[object, Picture] = {}
        self.by_id: dict[str, dict[int, Picture]] = defaultdict(dict)
        self.resolved: dict[tuple, Picture] = {}
        self.first: dict[tuple, str] = {}
        self.copies: dict[tuple, str] = {}
        self.seen: set[tuple] = set()
        self.kept: Counter = Counter()
        self.shared: list[tuple[str, str]] = []
        self.answers: dict[tuple, dict[str, tuple[Part, str]]] = defaultdict(dict)

    def listed(self, part: Part, key: str, name: str, own: str | None = None) -> Picture:
        """The picture of an entry that names its file.

        Raises
        ------
        AnnotationError
            If the name leaves the folder or fits pictures that differ, or two files
            put the picture into two splits.
        """
        name, split = inside(part, name), own or part.split
        path = self.tree.picture(part.file, name, split)
        if path and not own and "/" not in name and self.tree.apart(path, split):
            path = None  # the picture of another split that has the same name
        mark = path or (name, split)
        picture = (
            self.by_place.get(mark) or self._copy(key, path, split) or self._new(key, path, name)
        )
        self.by_place[mark] = self.by_id[key][id(picture)] = picture
        return self._placed(part, picture, split, BY_ENTRY if own else BY_FILE)

    def numbered(self, part: Part, key: str, split: str | None, by_name: bool = False) -> Picture:
        """The picture of an entry that gives an id alone.

        With ``by_name`` ids are names of files before they are those of other files.

        Raises
        ------
        AnnotationError
            If the id fits several pictures.
        """
        mark = (part.file, key, split)
        if mark not in self.resolved:
            self.resolved[mark] = self._resolve(part, key, split, by_name)
        return self._placed(part, self.resolved[mark], split, BY_ID)

    def _resolve(self, part: Part, key: str, split: str | None, by_name: bool) -> Picture:
        fitting = [p for p in self.by_id[key].values() if split is None or p.split in (None, split)]
        path = self._named_by(part, key, split) if by_name or not fitting else None
        if path or not fitting:
            picture = self.by_place.get(path) or self._new(key, path, f"{key}{PICTURES[0]}")
            self.by_place[path or (picture.source, split)] = self.by_id[key][id(picture)] = picture
            return picture
        beside = [p for p in fitting if posixpath.dirname(p.source) == posixpath.dirname(part.file)]
        if len(fitting) > 1 and len(beside) != 1:
            message = f"{part}: image {key} may be {fitting[0].source} or {fitting[1].source}"
            raise AnnotationError(
                message,
                "give every picture an id of its own, or put the split into the file's name",
            )
        return fitting[0] if len(fitting) == 1 else beside[0]

    def _named_by(self, part: Part, key: str, split: str | None) -> str | None:
        """The picture whose name is an id, as COCO and Visual Genome write it."""
        stems = [key]
        if key.isdecimal() and len(key) <= 12:
            stems += [
                f"{int(key):012d}",
                *(f"COCO_{at}_{int(key):012d}" for at in ("train2014", "val2014", "test2015")),
            ]
        names = (inside(part, f"{stem}{end}") for stem in stems for end in PICTURES)
        return next(
            filter(None, (self.tree.picture(part.file, name, split) for name in names)), None
        )

    def _copy(self, key: str, path: str | None, split: str | None) -> Picture | None:
        """A picture that is known under the same id already.

        It holds the same as another file of the same split.
        """
        first = self.first.setdefault((key, split), path) if path else None
        if first in (None, path):
            return None
        for one in (first, path):
            self.copies.setdefault((key, split, self.tree.content(one)), one)
        return self.by_place.get(self.copies[key, split, self.tree.content(path)])

    def _new(self, key: str, path: str | None, name: str) -> Picture:
        self.pictures.append(Picture(key, path or name, there=path is not None))
        return self.pictures[-1]

    def _placed(self, part: Part, picture: Picture, split: str | None, rank: int) -> Picture:
        """The picture, in the split of what knows best.

        Two splits for one picture would be one leaking into the other.
        """
        part.pictures[id(picture)] = picture
        if split and rank == picture.rank and split != picture.split:
            message = (
                f"{part}: {picture.source} is of {split}, but of "
                f"{picture.split} by {picture.teller}"
            )
            raise AnnotationError(
                message, "leave every picture in one split, so that none leaks into another"
            )
        if split and rank > picture.rank:
            picture.split, picture.rank, picture.teller = split, rank, part
        return picture

    def caption(self, part: Part, picture: Picture, text: str) -> None:
        """Add a caption that the picture does not have yet."""
        self._add(
            part,
            "captions",
            (id(picture), text.strip()) if text.strip() else None,
            picture.captions,
            text.strip(),
        )

    def question(
        self, part: Part, picture: Picture, question: Question, key: object = None
    ) -> None:
        """Add a question, once where the same one comes again under the same id."""
        self._add(part, "questions", (id(picture), key, question), picture.questions, question)

    def _add(self, part: Part, what: str, mark: tuple | None, to: list, content: object) -> None:
        if mark is None or mark in self.seen:
            part.left[f"{'empty' if mark is None else 'repeated'} {what}"] += 1
            return
        self.seen.add(mark)
        to.append(content)
        part.taken[what] += 1

    def box(self, part: Part, picture: Picture, box: tuple, key: object, crowd: bool) -> None:
        """Add a box unless it repeats one.

        Ids of boxes start anew in files, so the same is what has the same kind and
        place. Keypoints repeat the boxes of instances. Two boxes at one place of one
        file count twice if their ids differ.
        """
        mark = (id(picture), box)
        part.boxes[mark].add(key)
        if len(part.boxes[mark]) <= self.kept[mark]:
            part.left["repeated boxes"] += 1
            return
        self.kept[mark] += 1
        picture.boxes.append(box)
        picture.crowds |= {box[0]} if crowd else set()
        part.taken["boxes"] += 1

    def answer(self, part: Part, question: str, image: str | None, text: str) -> None:
        """Keep the answer to a question, by the question's id, the picture's and the file.

        Raises
        ------
        AnnotationError
            If the file answers the question twice, in two ways.
        """
        mine = self.answers[question, image]
        if mine.setdefault(part.file, (part, text))[1] != text:
            raise _two_answers(question, [mine[part.file], (part, text)])

    def answer_to(self, part: Part, question: str, image: str, split: str | None) -> str | None:
        """The answer to a question of a file: that of its picture, from a file of its split.

        None where there is none.

        Raises
        ------
        AnnotationError
            If files answer in different ways.
        """
        answers = [
            one for key in (image, None) for one in self.answers.get((question, key), {}).values()
        ]
        answers = [one for one in answers if split is None or one[0].split in (None, split)]
        answers = [one for one in answers if one[0].split == split] or answers
        at = posixpath.dirname(part.file)
        answers = [one for one in answers if posixpath.dirname(one[0].file) == at] or answers
        if len({text for _, text in answers}) > 1:
            raise _two_answers(question, answers)
        for k, (source, _) in enumerate(answers):
            (source.left if k else source.taken)["repeated answers" if k else "answers"] += 1
        return answers[0][1] if answers else None

    def finish(self) -> None:
        """Settle what only all files together say.

        Splits by pictures' folders, ids that are taken twice, pictures that are missing.
        """
        for kept in (self.seen, self.kept, *(part.boxes for part in self.parts)):
            kept.clear()  # of no use after reading, and large
        absent = [
            part
            for part in self.parts
            if part.pictures and not any(p.there for p in part.pictures.values())
        ]
        for part in absent:
            part.reason = str(missing(self.tree, list(part.pictures.values())))
            part.taken.clear()
        gone = {id(p) for part in absent for p in part.pictures.values()}
        needed = {id(p) for part in self.parts if not part.reason for p in part.pictures.values()}
        self.pictures = [p for p in self.pictures if id(p) in needed or id(p) not in gone]
        splits = {picture.split for picture in self.pictures} - {None}
        own = {id(p): folder_split(p.source) for p in self.pictures if p.split is None and p.there}
        # pictures that are all in one folder of a name are not divided by it
        if splits or len({*own.values()} - {None}) > 1:
            for picture in self.pictures:
                picture.split = picture.split or own.get(id(picture))
        self.shared = self._shared()
        often = Counter(picture.id for picture in self.pictures)
        for picture in self.pictures:
            picture.id = picture.source if often[picture.id] > 1 else picture.id

    def _shared(self) -> list[tuple[str, str]]:
        """Pictures of two splits under one id or name that hold the same.

        Files of other sizes need no reading.
        """
        alike, pairs = defaultdict(list), {}
        for picture in self.pictures:
            if picture.split and picture.there:
                for mark in (("id", picture.id), ("name", posixpath.basename(picture.source))):
                    alike[mark].append(picture)
        for one in (listed for listed in alike.values() if len({p.split for p in listed}) > 1):
            sizes = Counter(map(self.tree.size, (p.source for p in one)))
            first: dict[object, Picture] = {}
            for picture in (p for p in one if sizes[self.tree.size(p.source)] > 1):
                other = first.setdefault(self.tree.content(picture.source), picture)
                if other.split != picture.split:
                    pairs[other.source, picture.source] = None
        return list(pairs)


def missing(tree: Tree, pictures: Iterable[Picture]) -> AnnotationError:
    """The error that pictures are not there, the first by name."""
    first, *others = pictures
    more = f", as are {len(others)} more" if others else ""
    message = f"{tree.folder}: the picture {first.source} of image {first.id} is missing{more}"
    return AnnotationError(message, "put it into the folder or one below it")


def _two_answers(question: str, answers: list[tuple[Part, str]]) -> AnnotationError:
    listed = " and ".join(f"{text!r} ({part})" for part, text in answers[:3])
    return AnnotationError(
        f"question {question} has two answers: {listed}",
        "leave one, or put splits into the names of files or folders",
    )
