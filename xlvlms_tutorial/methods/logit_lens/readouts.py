r"""Read-outs of any state behind one interface: the candidate word that it stands for.

Each reader scores the same words, so that readers can be compared. The logit lens
(nostalgebraist, 2020) asks what the state would predict, the tuned lens (Belrose et al., 2023,
arXiv 2303.08112) asks so after an affine map into the last layer, the embedding lens asks which
input embedding it resembles, and contextual neighbours (LatentLens, Krojer et al., 2026,
arXiv 2602.00462) ask which word *in a sentence* it resembles.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.functional import normalize

from xlvlms_tutorial.activations.hooks import Layers, wanted
from xlvlms_tutorial.errors import InputError, damaged_record, incomparable
from xlvlms_tutorial.io import load_tensors, save_tensors
from xlvlms_tutorial.methods.logit_lens import distributions
from xlvlms_tutorial.methods.logit_lens.text_states import (
    TextStates,
    decoder_fingerprint,
    text_states,
)
from xlvlms_tutorial.models import anatomy
from xlvlms_tutorial.models.unembedding import unembedded
from xlvlms_tutorial.models.vlm import VLM
from xlvlms_tutorial.text import first_few
from xlvlms_tutorial.validation import require, require_counts, require_one_of

Candidates = Sequence[str] | Mapping[str, Sequence[str]]

# bytes of cosines that exist at a time
BLOCK = 32 * 2**20
_FORMAT = "xlvlms contextual neighbours 1"


class Reader(ABC):
    """Score candidate words for states of a layer; all read-outs have this interface.

    Parameters
    ----------
    vlm : VLM
        The model that the states are of.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import LogitLens, Reader
    >>> reader = LogitLens(vlm)
    >>> isinstance(reader, Reader), len(reader.pieces("ladybug"))
    (True, 2)
    """

    def __init__(self, vlm: VLM) -> None:
        distributions.require_tokenizer(vlm)
        self.vlm = vlm

    def read(
        self, states: Float[Tensor, "n d"], layer: int, candidates: Candidates
    ) -> Float[Tensor, "n c"]:
        """Score each candidate word for each state.

        Use the largest score of a row as the word that the state stands for. Scores of two readers
        have different units; the words they put first can be compared.

        Parameters
        ----------
        states : tensor (n, d)
            Rows of the residual stream.
        layer : int
            Their layer, 0 to L.
        candidates : sequence of str, or mapping of str to sequence of str
            The c words. A mapping gives the forms of each word, such as
            ``{"key": ["key", "keys"]}``; the best form counts.

        Returns
        -------
        tensor (n, c)
            Scores in float32 on the CPU: logits, or cosines.

        Raises
        ------
        InputError
            If there are no states or no candidates, a state is NaN or infinite, or of another
            width. If a word cannot be read: its tokens are unknown, or no sentence has it.
        LayerError
            If the model has no such layer.

        Examples
        --------
        >>> from xlvlms_tutorial.methods.logit_lens import EmbeddingLens
        >>> ids = vlm.tokenizer(" frog", return_tensors="pt").input_ids[0]
        >>> states = vlm.model.get_input_embeddings()(ids).detach()
        >>> scores = EmbeddingLens(vlm).read(states, 0, ["frog", "sand"])
        >>> scores.shape, int(scores.argmax())
        (torch.Size([1, 2]), 0)
        """
        distributions.check(self.vlm, states)
        wanted(self.vlm, layer)
        forms = as_forms(candidates)
        return self._scores(states.float(), layer, forms).float().cpu()

    @abstractmethod
    def _scores(
        self, states: Float[Tensor, "n d"], layer: int, forms: dict[str, list[str]]
    ) -> Float[Tensor, "n c"]:
        """Scores of words by their forms; the states are checked."""

    def pieces(self, form: str) -> list[int]:
        """Return the token ids of a word as it stands inside a sentence.

        Parameters
        ----------
        form : str
            The word, in the case in which it is read.

        Returns
        -------
        list of int
            Its pieces, without special tokens and bare spaces.

        Raises
        ------
        InputError
            If the vocabulary cannot spell it.
        """
        tokenizer = self.vlm.tokenizer
        ids = []
        for token in self.vlm.token_ids(form).tolist():
            if token not in tokenizer.all_special_ids and tokenizer.decode([token]).strip():
                ids.append(token)
        require(
            ids,
            f"the word {form!r} gives no token of this model",
            "give words that its vocabulary can spell",
        )
        return ids


def as_forms(candidates: Candidates) -> dict[str, list[str]]:
    """Return the forms of each candidate word, in lower case.

    Parameters
    ----------
    candidates : sequence of str, or mapping of str to sequence of str
        Words, or the forms of each word.

    Returns
    -------
    dict of str to list of str
        The forms by word; a word alone is its only form.

    Raises
    ------
    InputError
        If there are no words, one is blank or has no forms, or a single text is given.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import as_forms
    >>> as_forms(["Key", "sand"])
    {'Key': ['key'], 'sand': ['sand']}
    """
    require(not isinstance(candidates, str), "one text", "give a list of candidate words")
    require(len(candidates), "there are no candidate words", "give at least one")
    result = {}
    for word in candidates:
        forms = list(candidates[word]) if isinstance(candidates, Mapping) else [word]
        written = all(isinstance(form, str) and form.strip() for form in forms)
        require(forms and written, f"the forms {forms!r} of {word!r}", "give words that are text")
        result[word] = [form.strip().lower() for form in forms]
    return result


class LogitLens(Reader):
    """Read the words that a state would predict, were it the last: the logit lens.

    Use it as the baseline of all read-outs, and where states are near the output. The score of a
    word is the logit of its first piece, so words that begin alike cannot be told apart. It asks
    for the *next* word, whereas the other two kinds of reader ask for the word *at* a state.

    Parameters
    ----------
    vlm : VLM
        The model whose final norm and unembedding read the states.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import LogitLens
    >>> LogitLens(vlm).read(torch.ones(2, 576), 30, ["frog", "sand", "key"]).shape
    torch.Size([2, 3])
    """

    def _scores(
        self, states: Float[Tensor, "n d"], layer: int, forms: dict[str, list[str]]
    ) -> Float[Tensor, "n c"]:
        ids, sizes = [], []
        for word in forms:
            ids += [self.pieces(form)[0] for form in forms[word]]
            sizes.append(len(forms[word]))
        vlm = self.vlm
        rules = anatomy.logit_rules(vlm.model)
        parts = []
        for chunk in states.split(distributions.rows(vlm, distributions.CHUNK)):
            with torch.no_grad():
                logits = unembedded(vlm.model, chunk.to(vlm.dtype), rules, norm=True, ids=ids)
            distributions.check_logits(logits)
            best = [columns.amax(dim=1) for columns in logits.split(sizes, dim=1)]
            parts.append(torch.stack(best, dim=1).cpu())
        return torch.cat(parts)


class TunedLens(LogitLens):
    r"""Read what a state would predict after an affine map into the last layer: the tuned lens.

    Use it where the logit lens is blind, between the ends. The map of layer l,
    :math:`h \mapsto h + A_l h + b_l`, is fitted to the last-layer states of the same words of text
    by ridge regression, in closed form: a large penalty gives the logit lens with a mean shift.
    (Belrose et al. train the same map by the divergence of the predictions.)

    Parameters
    ----------
    vlm : VLM
        The model.
    ridge : float, default 1e-4
        The penalty on A, as a share of the states' mean variance.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import TunedLens, text_states
    >>> text = text_states(vlm, ["A frog sits on the sand.", "Two keys lie there."], [16, 30])
    >>> lens = TunedLens(vlm).fit(text)
    >>> lens.read(text.states[16], 16, ["frog", "sand"]).shape
    torch.Size([8, 2])
    """

    def __init__(self, vlm: VLM, ridge: float = 1e-4) -> None:
        super().__init__(vlm)
        require(ridge > 0, f"ridge is {ridge}", "give a number above 0")
        self.ridge = ridge
        self._maps: dict[int, tuple[Float[Tensor, "d d"], Float[Tensor, "d"]]] = {}

    def fit(self, text: TextStates) -> "TunedLens":
        """Fit the maps of all layers of these states of text.

        Parameters
        ----------
        text : TextStates
            States of the same model, the last layer among them.

        Returns
        -------
        TunedLens
            This lens.

        Raises
        ------
        InputError
            If the states are of another model, or their last layer is missing.
        """
        require_own(self.vlm, text)
        last = self.vlm.n_layers
        require(
            last in text.states,
            f"states of text at layers {text.layers} without the last",
            f"read layer {last} too",
        )
        target = text.states[last].double().numpy()
        for layer, states in text.states.items():
            x = states.double().numpy()
            alpha = self.ridge * len(x) * float(x.var(axis=0).mean())
            fitted = Ridge(alpha, solver="cholesky").fit(x, target - x)
            weights = torch.as_tensor(fitted.coef_.T, dtype=torch.float32)
            self._maps[layer] = weights, torch.as_tensor(fitted.intercept_, dtype=torch.float32)
        return self

    def translate(self, states: Float[Tensor, "n d"], layer: int) -> Float[Tensor, "n d"]:
        """Map states of a layer to what the last layer would hold.

        Parameters
        ----------
        states : tensor (n, d)
            Rows of the residual stream.
        layer : int
            Their layer, one that was fitted.

        Returns
        -------
        tensor (n, d)
            Predicted states of the last layer, before the final norm.

        Raises
        ------
        InputError
            If there is no map of this layer.
        """
        require_one_of(layer, self._maps, "fitted layer")
        weights, bias = self._maps[layer]
        states = states.float().cpu()
        return states + states @ weights + bias

    def _scores(
        self, states: Float[Tensor, "n d"], layer: int, forms: dict[str, list[str]]
    ) -> Float[Tensor, "n c"]:
        return super()._scores(self.translate(states, layer), layer, forms)


class EmbeddingLens(Reader):
    """Read the words whose input embeddings a state resembles most, by cosine.

    Use it for states near the input, and for soft prompts. The embedding of a word of several
    pieces is their mean.

    Parameters
    ----------
    vlm : VLM
        The model whose input embeddings are compared.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.logit_lens import EmbeddingLens
    >>> scores = EmbeddingLens(vlm).read(torch.ones(2, 576), 0, ["frog", "sand"])
    >>> bool((scores.abs() <= 1).all())
    True
    """

    def _scores(
        self, states: Float[Tensor, "n d"], layer: int, forms: dict[str, list[str]]
    ) -> Float[Tensor, "n c"]:
        embedding = self.vlm.model.get_input_embeddings()
        directions = normalize(states.cpu(), dim=1)
        scores = []
        for word in forms:
            embedded = []
            for form in forms[word]:
                ids = torch.tensor(self.pieces(form), device=self.vlm.device)
                with torch.no_grad():
                    embedded.append(embedding(ids).float().mean(dim=0).cpu())
            cosines = directions @ normalize(torch.stack(embedded), dim=1).T
            scores.append(cosines.amax(dim=1))
        return torch.stack(scores, dim=1)


class ContextualNeighbours(Reader):
    """Read the words in sentences whose states a state resembles most, by cosine: LatentLens.

    Use it for states at any layer, such as image tokens: the states of a word differ from sentence
    to sentence and from layer to layer, and one of them may be near although no embedding is. The
    score of a word is the largest cosine with any of its states in the index.

    Parameters
    ----------
    vlm : VLM
        The model.
    at : "all", "same" or int, default "all"
        Which layers of the index are compared: all of them, whatever the layer of the states (as
        LatentLens does), that of the states, or one that is given.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import ContextualNeighbours, text_states
    >>> text = text_states(vlm, ["A frog sits on the sand.", "Two keys lie there."], [8, 16])
    >>> reader = ContextualNeighbours(vlm).fit(text)
    >>> scores = reader.read(text.states[16], 16, {"frog": ["frog"], "key": ["key", "keys"]})
    >>> scores.argmax(dim=1)[[0, 5]].tolist()  # of "frog" and "keys" themselves
    [0, 1]
    """

    def __init__(self, vlm: VLM, at: str | int = "all") -> None:
        super().__init__(vlm)
        if at not in ("all", "same"):
            require(not isinstance(at, str), f"at={at!r}", 'give "all", "same" or a layer')
            wanted(vlm, at)
        self.at = at
        self._units: dict[int, Float[Tensor, "m d"]] = {}
        self._words = np.array([], dtype=str)
        self._places = np.array([], dtype=int)
        self._sentences: tuple[str, ...] = ()

    @property
    def layers(self) -> list[int]:
        """The layers of the index."""
        return list(self._units)

    def fit(self, text: TextStates) -> "ContextualNeighbours":
        """Make the index of states of text.

        Parameters
        ----------
        text : TextStates
            States of the same model.

        Returns
        -------
        ContextualNeighbours
            This reader.

        Raises
        ------
        InputError
            If the states are of another model.
        """
        require_own(self.vlm, text)
        self._units = {layer: normalize(states, dim=1) for layer, states in text.states.items()}
        self._words = np.array(text.words)
        self._places = text.places
        self._sentences = text.sentences
        return self

    def comparing(self, at: str | int) -> "ContextualNeighbours":
        """Return a reader with the same index that compares other layers of it.

        Parameters
        ----------
        at : "all", "same" or int
            Which layers, as for the class.

        Returns
        -------
        ContextualNeighbours
            A new reader; the index is shared.
        """
        reader = ContextualNeighbours(self.vlm, at)
        reader._units = self._units
        reader._words, reader._places = self._words, self._places
        reader._sentences = self._sentences
        return reader

    def has(self, word: str) -> bool:
        """Tell whether a word stands in the index.

        Parameters
        ----------
        word : str
            The word, in any case.

        Returns
        -------
        bool
            Whether a sentence has it behind its first word.
        """
        return bool((self._words == word.lower()).any())

    def neighbours(self, states: Float[Tensor, "n d"], layer: int, k: int = 5) -> pd.DataFrame:
        """List the nearest words in sentences of each state, whatever they are.

        Parameters
        ----------
        states : tensor (n, d)
            Rows of the residual stream.
        layer : int
            Their layer.
        k : int, default 5
            How many neighbours of each state.

        Returns
        -------
        DataFrame
            One row for each state (``row``) and ``rank``, with the ``word``, its ``sentence``, the
            ``layer`` of the index, and the ``cosine``.

        Raises
        ------
        InputError
            If there is no index, or no such layer in it, or ``k`` is not between 1 and its size.
        """
        distributions.check(self.vlm, states)
        wanted(self.vlm, layer)
        require_counts(k=k)
        layers = self._compared(layer)
        n_rows = len(self._words)
        require(k <= n_rows * len(layers), f"k is {k}", "give no more than the index has")
        cosines, numbers = [], []
        for which, compared in enumerate(layers):
            for _, block in self._blocks(states.float(), self._units[compared]):
                top = block.topk(min(k, n_rows), dim=1)
                cosines.append(top.values.cpu())
                numbers.append(top.indices.cpu() + which * n_rows)
        n_blocks = len(cosines) // len(layers)
        by_layer = []
        for parts in (cosines, numbers):
            layer_parts = [
                torch.cat(parts[start : start + n_blocks])
                for start in range(0, len(parts), n_blocks)
            ]
            by_layer.append(torch.cat(layer_parts, dim=1))
        best = by_layer[0].topk(k, dim=1)
        cosines = best.values
        numbers = by_layer[1].gather(1, best.indices).numpy().ravel()
        which, rows = np.divmod(numbers, n_rows)
        return pd.DataFrame(
            {
                "row": np.repeat(np.arange(len(states)), k),
                "rank": np.tile(np.arange(1, k + 1), len(states)),
                "word": self._words[rows],
                "sentence": [self._sentences[place] for place in self._places[rows]],
                "layer": np.array(layers)[which],
                "cosine": cosines.numpy().ravel(),
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write the index to one file of safetensors, with the fingerprint of the model's weights.

        Directions are written in half precision.

        Parameters
        ----------
        path : str or Path
            The file to write or to replace.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        InputError
            If there is no index.
        FileError
            If the file cannot be written.
        """
        self._compared(None)
        tensors = {f"layer {layer}": units.half() for layer, units in self._units.items()}
        tensors["places"] = torch.as_tensor(self._places)
        metadata = {
            "format": _FORMAT,
            "model": self.vlm.name,
            "fingerprint": decoder_fingerprint(self.vlm),
            "at": json.dumps(self.at),
            "layers": json.dumps(self.layers),
            "words": json.dumps(self._words.tolist()),
            "sentences": json.dumps(self._sentences),
        }
        return save_tensors(path, tensors, metadata)

    @staticmethod
    def load(path: str | Path, vlm: VLM) -> "ContextualNeighbours":
        """Read an index that :meth:`save` wrote, for the same model.

        Parameters
        ----------
        path : str or Path
            The file.
        vlm : VLM
            The model; its name does not matter, its weights do.

        Returns
        -------
        ContextualNeighbours
            The reader with its index.

        Raises
        ------
        FileError
            If there is no such file, or it is no index, or is damaged.
        InputError
            If the index is of another model.
        """
        try:
            tensors, metadata = load_tensors(path)
            if metadata.get("format") != _FORMAT:
                raise damaged_record(path, "no index of contextual neighbours")
            words, sentences = json.loads(metadata["words"]), json.loads(metadata["sentences"])
            units = {}
            for layer in json.loads(metadata["layers"]):
                units[int(layer)] = tensors[f"layer {layer}"].float()
            places = tensors["places"].numpy()
            fitting = all(len(rows) == len(words) == len(places) for rows in units.values())
            require(fitting and max(places) < len(sentences), "unequal parts", "make it again")
            stated, at = (metadata["model"], metadata["fingerprint"]), json.loads(metadata["at"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as cause:
            raise damaged_record(path, f"no index, or damaged ({cause})") from cause
        _require_same(vlm, *stated)
        reader = ContextualNeighbours(vlm, at)
        text = TextStates(units, tuple(words), places, tuple(sentences), *stated)
        return reader.fit(text)

    def _compared(self, layer: int | None) -> list[int]:
        """The layers of the index that states of a layer are compared with."""
        require(self._units, "the reader has no index", "fit it to states of text")
        if self.at == "all" or layer is None:
            return self.layers
        compared = layer if self.at == "same" else self.at
        require_one_of(compared, self.layers, "layer of the index")
        return [compared]

    def _scores(
        self, states: Float[Tensor, "n d"], layer: int, forms: dict[str, list[str]]
    ) -> Float[Tensor, "n c"]:
        layers = self._compared(layer)
        groups = [np.flatnonzero(np.isin(self._words, forms[word])) for word in forms]
        absent = [word for word, rows in zip(forms, groups, strict=True) if not len(rows)]
        if absent:
            raise InputError(
                f"no sentence of the index has {first_few(absent, 5)}",
                "give sentences that have each candidate word behind their first word",
            )
        sizes = [len(rows) for rows in groups]
        rows = np.concatenate(groups)
        scores = torch.full((len(states), len(groups)), -torch.inf)
        for compared in layers:
            for start, cosines in self._blocks(states, self._units[compared][rows]):
                best = [part.amax(dim=1) for part in cosines.split(sizes, dim=1)]
                block = scores[start : start + len(cosines)]
                torch.maximum(block, torch.stack(best, dim=1).cpu(), out=block)
        return scores

    def _blocks(
        self, states: Float[Tensor, "n d"], units: Float[Tensor, "m d"]
    ) -> Iterator[tuple[int, Float[Tensor, "b m"]]]:
        """Cosines of some states at a time, on the model's device, with the number of the first."""
        units = units.to(self.vlm.device)
        start = 0
        for block in states.split(max(1, BLOCK // (4 * len(units)))):
            yield start, normalize(block.to(units.device), dim=1) @ units.T
            start += len(block)


def require_own(vlm: VLM, text: TextStates) -> None:
    """Refuse states of text of another model.

    Raises
    ------
    InputError
        If the weights differ.
    """
    _require_same(vlm, text.model, text.fingerprint)


def _require_same(vlm: VLM, model: str, fingerprint: str) -> None:
    present = decoder_fingerprint(vlm)
    if present != fingerprint:
        raise incomparable(
            "weights behind an index of text and a model",
            f"{model} ({fingerprint[:8]})",
            f"{vlm.name} ({present[:8]})",
            "make the index again with this model",
        )


def readers(
    vlm: VLM,
    sentences: Iterable[str],
    layers: Layers,
    ridge: float = 1e-4,
    at: str | int = "all",
    batch_size: int = 32,
) -> dict[str, Reader]:
    """Make all four read-outs of a model, with one pass over some sentences.

    Use it to read the same states by each of them, with the same candidate words.

    Parameters
    ----------
    vlm : VLM
        The model.
    sentences : iterable of str
        Sentences with the words that states may stand for, in context. A few hundred are enough for
        a small world.
    layers : int, iterable of int, or "all"
        The layers whose states will be read; the index has the same.
    ridge : float, default 1e-4
        Of the :class:`TunedLens`.
    at : "all", "same" or int, default "all"
        Of :class:`ContextualNeighbours`.
    batch_size : int, default 32
        How many sentences go through the model at once.

    Returns
    -------
    dict of str to Reader
        "logit lens", "tuned lens", "embedding lens" and "contextual neighbours".

    Raises
    ------
    InputError, LayerError
        As of :func:`text_states`.

    Examples
    --------
    >>> from xlvlms_tutorial.methods.logit_lens import readers
    >>> made = readers(vlm, ["A frog sits on the sand."], [16])
    >>> list(made)
    ['logit lens', 'tuned lens', 'embedding lens', 'contextual neighbours']
    """
    numbers = [layer for layer, _ in wanted(vlm, layers)]
    text = text_states(vlm, sentences, [*numbers, vlm.n_layers], batch_size)
    index = TextStates(
        {layer: text.states[layer] for layer in numbers},
        text.words,
        text.places,
        text.sentences,
        text.model,
        text.fingerprint,
    )
    return {
        "logit lens": LogitLens(vlm),
        "tuned lens": TunedLens(vlm, ridge).fit(text),
        "embedding lens": EmbeddingLens(vlm),
        "contextual neighbours": ContextualNeighbours(vlm, at).fit(index),
    }
