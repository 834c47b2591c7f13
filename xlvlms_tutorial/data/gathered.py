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
    """Hold the record of one picture, with what told its split."""

    exists: bool = True
    rank: int = 0
    teller: object = None


@dataclass
class Part:
    """Hold how much of a file was taken and left, and why where nothing could be taken."""

    file: str  # from the folder
    path: str
    split: str | None = None
    form: str = ""
    used: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)
    reason: str = ""
    quiet: bool = False  # nobody meant it for data
    pictures: dict[int, Picture] = field(default_factory=dict)
    boxes: dict[tuple, set] = field(default_factory=lambda: defaultdict(set))

    def __str__(self) -> str:
        return self.path

    @property
    def why(self) -> str:
        """Return the reason in few words: without the path, and without the list of forms."""
        return self.reason.replace(self.path, "").partition("; known forms")[0].strip(" :.")


class Gathered:
    """Collect the pictures of a folder.

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
        self.marks: set[tuple] = set()  # of captions and questions that are added already
        self.n_boxes: Counter = Counter()  # at each place of a picture
        self.shared: list[tuple[str, str]] = []
        self.answers: dict[tuple, dict[str, tuple[Part, str]]] = defaultdict(dict)

    def listed(self, part: Part, key: str, name: str, entry_split: str | None = None) -> Picture:
        """Return the picture of an entry that names its file.

        Parameters
        ----------
        part : Part
            The file of annotations.
        key : str
            The picture's id in that file.
        name : str
            The picture's file.
        entry_split : str, optional
            The split that the entry tells; by default the file's.

        Raises
        ------
        AnnotationError
            If the name leaves the folder or fits pictures that differ, or two files
            put the picture into two splits.
        """
        name = inside(part, name)
        split = entry_split or part.split
        path = self.tree.picture(part.file, name, split)
        if path and not entry_split and "/" not in name and self.tree.apart(path, split):
            path = None  # the picture of another split that has the same name
        mark = path or (name, split)
        picture = self.by_place.get(mark) or self._copy(key, path, split)
        if picture is None:
            picture = self._new(key, path, name)
        self.by_place[mark] = picture
        self.by_id[key][id(picture)] = picture
        reason = BY_ENTRY if entry_split else BY_FILE
        return self._placed(part, picture, split, reason)

    def numbered(self, part: Part, key: str, split: str | None, by_name: bool = False) -> Picture:
        """Return the picture of an entry that gives an id alone.

        Parameters
        ----------
        part : Part
            The file of annotations.
        key : str
            The picture's id.
        split : str or None
            The split that the file tells.
        by_name : bool, default False
            Whether ids are names of files before they are those of other files.

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
        """Return the picture that an id stands for, in this split."""
        fitting = list(self.by_id[key].values())
        if split is not None:
            fitting = [picture for picture in fitting if picture.split in (None, split)]
        path = self._named_by(part, key, split) if by_name or not fitting else None
        if path or not fitting:
            picture = self.by_place.get(path) or self._new(key, path, f"{key}{PICTURES[0]}")
            mark = path or (picture.source, split)
            self.by_place[mark] = picture
            self.by_id[key][id(picture)] = picture
            return picture
        if len(fitting) == 1:
            return fitting[0]
        folder = posixpath.dirname(part.file)
        beside = [picture for picture in fitting if posixpath.dirname(picture.source) == folder]
        if len(beside) == 1:
            return beside[0]
        raise AnnotationError(
            f"{part}: image {key} may be {fitting[0].source} or {fitting[1].source}",
            "give every picture an id of its own, or put the split into the file's name",
        )

    def _named_by(self, part: Part, key: str, split: str | None) -> str | None:
        """Return the picture whose name is an id, as COCO and Visual Genome write it."""
        stems = [key]
        if key.isdecimal() and len(key) <= 12:
            number = f"{int(key):012d}"
            stems.append(number)
            for year in ("train2014", "val2014", "test2015"):
                stems.append(f"COCO_{year}_{number}")
        for stem in stems:
            for end in PICTURES:
                path = self.tree.picture(part.file, inside(part, f"{stem}{end}"), split)
                if path:
                    return path
        return None

    def _copy(self, key: str, path: str | None, split: str | None) -> Picture | None:
        """Return a picture that is known under the same id already.

        It holds the same as another file of the same split.
        """
        first = self.first.setdefault((key, split), path) if path else None
        if first in (None, path):
            return None
        for file in (first, path):
            self.copies.setdefault((key, split, self.tree.content(file)), file)
        return self.by_place.get(self.copies[key, split, self.tree.content(path)])

    def _new(self, key: str, path: str | None, name: str) -> Picture:
        self.pictures.append(Picture(key, path or name, exists=path is not None))
        return self.pictures[-1]

    def _placed(self, part: Part, picture: Picture, split: str | None, rank: int) -> Picture:
        """Return the picture, in the split of what knows best.

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
            picture.split = split
            picture.rank = rank
            picture.teller = part
        return picture

    def caption(self, part: Part, picture: Picture, text: str) -> None:
        """Add a caption that the picture does not have yet.

        Parameters
        ----------
        part : Part
            The file that says it.
        picture : Picture
            The picture.
        text : str
            The caption.
        """
        text = text.strip()
        if text:
            self._add(part, "captions", (id(picture), text), picture.captions, text)
        else:
            part.unused["empty captions"] += 1

    def question(
        self, part: Part, picture: Picture, question: Question, key: object = None
    ) -> None:
        """Add a question, once where the same one comes again under the same id.

        Parameters
        ----------
        part : Part
            The file that asks it.
        picture : Picture
            The picture.
        question : Question
            The question with its answer.
        key : object, optional
            The question's id.
        """
        self._add(part, "questions", (id(picture), key, question), picture.questions, question)

    def _add(self, part: Part, kind: str, mark: tuple, entries: list, content: object) -> None:
        if mark in self.marks:
            part.unused[f"repeated {kind}"] += 1
            return
        self.marks.add(mark)
        entries.append(content)
        part.used[kind] += 1

    def box(self, part: Part, picture: Picture, box: tuple, key: object, crowd: bool) -> None:
        """Add a box unless it repeats one.

        Ids of boxes start anew in files, so the same is what has the same kind and
        place. Keypoints repeat the boxes of instances. Two boxes at one place of one
        file count twice if their ids differ.

        Parameters
        ----------
        part : Part
            The file that has it.
        picture : Picture
            The picture.
        box : tuple
            The kind, x, y, width and height in pixels.
        key : object
            The box's id.
        crowd : bool
            Whether it holds more than one of its kind.
        """
        mark = (id(picture), box)
        part.boxes[mark].add(key)
        if len(part.boxes[mark]) <= self.n_boxes[mark]:
            part.unused["repeated boxes"] += 1
            return
        self.n_boxes[mark] += 1
        picture.boxes.append(box)
        if crowd:
            picture.crowds.add(box[0])
        part.used["boxes"] += 1

    def answer(self, part: Part, question: str, image: str | None, text: str) -> None:
        """Keep the answer to a question, by the question's id, the picture's and the file.

        Parameters
        ----------
        part : Part
            The file that answers.
        question : str
            The question's id.
        image : str or None
            The picture's id.
        text : str
            The answer.

        Raises
        ------
        AnnotationError
            If the file answers the question twice, in two ways.
        """
        by_file = self.answers[question, image]
        first = by_file.setdefault(part.file, (part, text))
        if first[1] != text:
            raise _two_answers(question, [first, (part, text)])

    def answer_to(self, part: Part, question: str, image: str, split: str | None) -> str | None:
        """Return the answer to a question of a file: that of its picture, from a file of its split.

        Parameters
        ----------
        part : Part
            The file that asks.
        question : str
            The question's id.
        image : str
            The picture's id.
        split : str or None
            The split of the question.

        Returns
        -------
        str or None
            The answer, None where there is none.

        Raises
        ------
        AnnotationError
            If files answer in different ways.
        """
        answers: list[tuple[Part, str]] = []
        for key in (image, None):
            answers += self.answers.get((question, key), {}).values()
        if split is not None:
            answers = [pair for pair in answers if pair[0].split in (None, split)]
        # files of the same split go before others, then files of the same folder
        answers = [pair for pair in answers if pair[0].split == split] or answers
        folder = posixpath.dirname(part.file)
        answers = [pair for pair in answers if posixpath.dirname(pair[0].file) == folder] or answers
        if not answers:
            return None
        texts = {text for _, text in answers}
        if len(texts) > 1:
            raise _two_answers(question, answers)
        (source, text), *repeated = answers
        source.used["answers"] += 1
        for source, _ in repeated:
            source.unused["repeated answers"] += 1
        return text

    def finish(self) -> None:
        """Settle what only all files together say.

        Splits by pictures' folders, ids that are taken twice, pictures that are missing.
        """
        # of no use after reading, and large
        self.marks.clear()
        self.n_boxes.clear()
        gone = set()
        needed = set()
        for part in self.parts:
            part.boxes.clear()
            pictures = list(part.pictures.values())
            all_missing = not any(picture.exists for picture in pictures)
            if pictures and all_missing:
                part.reason = str(missing(self.tree, pictures))
                part.used.clear()
                gone.update(part.pictures)
            if not part.reason:
                needed.update(part.pictures)
        gone -= needed
        self.pictures = [picture for picture in self.pictures if id(picture) not in gone]
        by_folder = {}
        for picture in self.pictures:
            if picture.split is None and picture.exists:
                by_folder[id(picture)] = folder_split(picture.source)
        folder_splits = set(by_folder.values()) - {None}
        # pictures that are all in one folder of a name are not divided by it
        if self.splits() or len(folder_splits) > 1:
            for picture in self.pictures:
                picture.split = picture.split or by_folder.get(id(picture))
        self.shared = self._shared()
        n_ids = Counter(picture.id for picture in self.pictures)
        for picture in self.pictures:
            if n_ids[picture.id] > 1:
                picture.id = picture.source

    def splits(self) -> set[str]:
        """Return the splits that any picture is in."""
        return {picture.split for picture in self.pictures} - {None}

    def _shared(self) -> list[tuple[str, str]]:
        """List pictures of two splits under one id or name that hold the same.

        Files of other sizes need no reading.
        """
        groups = defaultdict(list)
        for picture in self.pictures:
            if picture.split and picture.exists:
                groups["id", picture.id].append(picture)
                groups["name", posixpath.basename(picture.source)].append(picture)
        pairs: dict[tuple[str, str], None] = {}
        for group in groups.values():
            splits = {picture.split for picture in group}
            if len(splits) < 2:
                continue
            sizes = [self.tree.size(picture.source) for picture in group]
            counts = Counter(sizes)
            by_content: dict[object, Picture] = {}
            for picture, size in zip(group, sizes, strict=True):
                if counts[size] < 2:
                    continue
                first = by_content.setdefault(self.tree.content(picture.source), picture)
                if first.split != picture.split:
                    pairs[first.source, picture.source] = None
        return list(pairs)


def missing(tree: Tree, pictures: Iterable[Picture]) -> AnnotationError:
    """Make the error that pictures are not there, the first by name."""
    first, *rest = pictures
    message = f"{tree.folder}: the picture {first.source} of image {first.id} is missing"
    if rest:
        message += f", as are {len(rest)} more"
    return AnnotationError(message, "put it into the folder or one below it")


def _two_answers(question: str, answers: list[tuple[Part, str]]) -> AnnotationError:
    listed = " and ".join(f"{text!r} ({part})" for part, text in answers[:3])
    return AnnotationError(
        f"question {question} has two answers: {listed}",
        "leave one, or put splits into the names of files or folders",
    )
