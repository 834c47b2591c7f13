"""A vision-language model with its processor.

Prompts, batches, spans, forward, generation, unembedding.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor
from transformers.utils import ModelOutput

from xlvlms_tutorial.errors import DeviceMemoryError, InputError, ModalityError
from xlvlms_tutorial.models import anatomy, prompts, support
from xlvlms_tutorial.models.devices import home
from xlvlms_tutorial.models.processors import (
    advice,
    padding_first,
    reads,
    require_embedded,
    require_padding,
)
from xlvlms_tutorial.models.sharing import (
    Finite,
    after_prompts,
    beginnings,
    by_picture,
    common_beginning,
    continued,
    greedy,
    padding,
    shareable,
    taken,
)
from xlvlms_tutorial.models.spans import (
    SPANS,
    Batch,
    label,
    label_turns,
    positions,
    run_lengths,
)
from xlvlms_tutorial.models.turns import (
    Conversation,
    Turn,
    conversations_of,
    require_history,
    require_takes,
)
from xlvlms_tutorial.models.unembedding import unembedded
from xlvlms_tutorial.samples import Sample, media
from xlvlms_tutorial.validation import require_counts

_MEDIA = {"image": "images", "video": "videos", "audio": "audio"}  # as processors call them


class VLM:
    """A vision-language model with its processor.

    It makes prompts and batches, knows which positions are picture, question and answer, and runs,
    generates and unembeds. Use ``load`` or ``from_model`` of ``loading`` to make one: they check
    what they take; ``VLM(...)`` itself takes what it is given.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers, of whatever class.
    processor : object or None
        Its processor, which goes with what takes pictures and texts. None for a model whose inputs
        are made elsewhere and go through :meth:`prepare`.
    name : str
        What records call these weights.
    revision : str, optional
        The revision of the weights, for records. None where there is none.

    Attributes
    ----------
    model : torch.nn.Module
        The model of transformers itself.
    processor : object or None
        Its processor.
    tokenizer : PreTrainedTokenizerBase or None
        The processor's tokenizer, which pads on the left.
    name : str
        What records call these weights, an adapter or quantisation included.
    revision : str or None
        Their revision.
    blocks : torch.nn.ModuleList
        The decoder blocks; ``blocks[l - 1]`` writes layer l of the residual stream.
    checks : DataFrame or None
        The self-checks of an architecture outside the table of tested ones.
    refused : dict
        What the self-checks found wrong, by what is done and at which site.
    active : list of str
        The interventions that hold now, with their arguments.

    Examples
    --------
    >>> from xlvlms_tutorial import load
    >>> pocket = load("pocket-llava")
    >>> pocket.n_layers, pocket.width
    (30, 576)
    >>> answers = pocket.generate([samples[0].image], ["What colour is the sky?"], max_new_tokens=3)
    >>> len(answers)
    1
    >>> inputs = pocket.batch([samples[0].image], ["What colour is the sky?"])
    >>> hidden_states = pocket.forward(inputs, output_hidden_states=True).hidden_states
    >>> len(hidden_states), hidden_states[0].shape[-1]
    (31, 576)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: object | None,
        name: str,
        revision: str | None = None,
    ) -> None:
        support.require_hookable(model)
        self.model = model
        self.processor = processor
        self.name = name
        self.revision = revision
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "left"  # generation continues each row at its right end
            require_padding(self.tokenizer, anatomy.embedded(self.model))
        self.blocks = anatomy.decoder_blocks(model)
        # of an architecture outside the table: its self-checks
        self.checks: pd.DataFrame | None = None
        # what the self-checks found wrong, by what is done and at which site
        self.refused: dict[tuple[str, str], str] = {}
        # what goes through the model now: interventions and captures ask where its spans are
        self.running: Batch | None = None
        # interventions on each layer, in the order in which they were entered
        self.edits: dict[int, list] = {}
        self.active: list[str] = []  # the interventions that hold now, with their arguments
        # how many vectors are folded into the biases of each layer
        self.folded: Counter[int] = Counter()
        # how many interventions replace the work of each block
        self.bypassed: Counter[int] = Counter()

    @property
    def device(self) -> torch.device:
        """The device of the weights, or the one they are brought to when they are offloaded."""
        return home(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    @property
    def n_layers(self) -> int:
        """The number L of decoder blocks.

        Layers of the residual stream run from 0 (embeddings) to L.
        """
        return len(self.blocks)

    def layer_at(self, share: float) -> int:
        """Return the layer at a share of the depth.

        Use it instead of a number, so that a choice of layer carries over to other models.

        Parameters
        ----------
        share : float
            From 0 (embeddings) to 1 (last layer).

        Returns
        -------
        int
            The nearest layer: 0.8 is layer 24 of 30 and 26 of 32.

        Raises
        ------
        InputError
            If the share does not lie in 0 to 1.

        Examples
        --------
        >>> vlm.layer_at(0.8)
        24
        """
        if not 0 <= share <= 1:
            raise InputError(f"depth {share!r}", "a share from 0 (embeddings) to 1 (last layer)")
        return math.floor(share * self.n_layers + 0.5)

    @property
    def width(self) -> int:
        """The width d of the residual stream."""
        return self.model.config.get_text_config(decoder=True).hidden_size

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """The id that stands in ``input_ids`` for one visual, video or audio token.

        Empty where pictures enter by cross-attention.
        """
        return anatomy.placeholders(self.model)

    @property
    def image_token_id(self) -> int:
        """The id that stands in ``input_ids`` for one visual token."""
        return self.model.config.image_token_id

    @cached_property
    def _logit_rules(self) -> dict[str, float]:
        return anatomy.logit_rules(self.model)

    @cached_property
    def accepts(self) -> frozenset[str]:
        """The arguments that the model's ``forward`` takes by name."""
        return support.accepted(self.model)

    def supports(self, what: str, site: str, layer: int | None = None) -> bool:
        """Tell whether this model allows something at a site of its blocks.

        Ask it before you choose a site for any model. Changing the residual stream works at all
        layers of all models. What is not allowed is refused where it is asked for, with the reason.

        Parameters
        ----------
        what : str
            "read", "skip", "parallel" or "fold".
        site : str
            For "read" one of ``anatomy.SITES``; for "skip" "block", "mlp" or "attention"; for
            "parallel" whose norm is used, "first" or "second"; for "fold" "mlp".
        layer : int, optional
            The layer (from 1) whose block is asked about; by default all blocks.

        Returns
        -------
        bool
            True if all these blocks allow it and no self-check has failed there.

        Raises
        ------
        InputError
            If ``what``, or the site for it, is unknown.

        Examples
        --------
        >>> vlm.supports("read", "mlp_hidden"), vlm.supports("skip", "block", layer=3)
        (True, True)
        """
        blocks = self.blocks if layer is None else [self.blocks[layer - 1]]
        return support.allowed(blocks, self.refused, what, site)

    def prompt(
        self,
        text: str,
        answer: str | None = None,
        media: Sequence[str] = ("image",),
        history: Sequence[Turn | tuple] = (),
        system: str | None = None,
    ) -> str:
        """Return the chat-formatted prompt for a text about a picture, video or sound.

        Use it to see what the model reads; :meth:`batch` makes prompts itself. Models without a
        chat template get the text as it is, which then says itself where the picture goes.

        Parameters
        ----------
        text : str
            The question or instruction.
        answer : str, optional
            The answer to put after the prompt; by default the prompt ends where the answer begins.
        media : sequence of str
            What is shown: "image" (the default), "video" or "audio", as often as there are some.
            Empty for text alone.
        history : sequence of Turn
            Earlier turns; none by default.
        system : str, optional
            A system prompt; by default the chat template's own, if it has one.

        Returns
        -------
        str
            The prompt, with a placeholder for what is shown.

        Raises
        ------
        InputError
            If the text is empty, or text or answer hold what marks a picture for this model.
        LoadError
            If the chat template fails.

        Examples
        --------
        >>> vlm.prompt("What is it?").splitlines()
        ['<|im_start|>user', '<reponame>What is it?<|im_end|>', '<|im_start|>assistant']
        """
        earlier = conversations_of([text], None, [history], system)[0].history
        return prompts.prompt_of(self.processor, self.name, text, answer, media, earlier, system)

    def batch(
        self,
        images: Sequence[object] | None,
        texts: Sequence[str],
        answers: Sequence[str] | None = None,
        videos: Sequence[object] | None = None,
        audio: Sequence[object] | None = None,
        names: Sequence[object] | None = None,
        history: Sequence[Sequence[Turn | tuple]] | None = None,
        system: str | None = None,
    ) -> Batch:
        """Make model inputs for pictures (videos, sounds) and texts, left-padded.

        Parameters
        ----------
        images : sequence or None
            A picture for each text: PIL image, array, bytes or path. A list of pictures where a
            text is about several, an empty list where it is about none. None where nothing is seen.
        texts : sequence of str
            The questions or instructions, b of them.
        answers : sequence of str, optional
            An answer for each text, put after its prompt; by default prompts end where answers
            begin.
        videos : sequence, optional
            A clip for each text: a list of frames.
        audio : sequence, optional
            A sound for each text: a 1-d array of samples.
        names : sequence, optional
            What errors call the samples; their numbers from 0 by default.
        history : sequence of sequences of Turn, optional
            For each text the earlier turns of its conversation, such as the demonstrations of
            in-context learning; none by default.
        system : str, optional
            A system prompt for all; by default the chat template's own, if it has one.

        Returns
        -------
        Batch
            ``input_ids`` and ``attention_mask`` (b, t), what the processor makes of pictures, and
            ``spans`` (b, t), which say what stands at each position.

        Raises
        ------
        InputError
            If a text is empty or holds what marks a picture for this model, a sound is none, or
            pictures, texts and answers are not equally many. If something given as a picture is
            none, or is not taken by the model's processor. If a text has no picture or several, and
            the model takes one; if a prompt has more places for pictures than pictures, or fewer;
            if the chat template leaves out the system prompt or an earlier turn.
        ModalityError
            If the model does not read pictures, videos or sounds, whichever is given.
        LoadError
            If chat template or tokenizer do not go with the model.

        Examples
        --------
        >>> inputs = vlm.batch([samples[0].image], ["Describe the picture."], ["A frog."])
        >>> len(inputs["input_ids"]), int(inputs.mask("image").sum())
        (1, 16)
        >>> bool(inputs.mask("answer").any())
        True

        One text about two pictures, and one about none after an earlier turn about one:

        >>> pictures = [[samples[0].image, samples[1].image], []]
        >>> turns = [[], [(samples[2].image, "What is it?", "A key.")]]
        >>> inputs = vlm.batch(pictures, ["Which is red?", "Which colour?"], history=turns)
        >>> inputs.mask("image").sum(dim=1).tolist(), inputs.mask("image 1").sum(dim=1).tolist()
        ([32, 16], [16, 16])
        """
        prompts.counted(texts, answers, image=images, video=videos, audio=audio)
        conversations = conversations_of(texts, images, history, system)
        arguments = prompts.media_of(conversations, videos, audio)
        kinds = tuple(kind for kind, name in _MEDIA.items() if name in arguments)
        names = range(len(texts)) if names is None else names
        # PaliGemma ends the prompt itself
        suffixed = answers is not None and "suffix" in prompts.text_options(self.processor)
        endings = [None] * len(texts) if answers is None or suffixed else answers
        modalities = reads(self.processor)
        if unread := [kind for kind in kinds if kind not in modalities]:
            raise ModalityError(unread[0], self.name, modalities, advice(self.processor))
        prompts.require_texts(self.processor, texts, answers, names, conversations)
        if "image" in kinds:
            require_takes(self.processor, self.name, conversations, names)
        embedded = anatomy.embedded(self.model)
        require_padding(self.tokenizer, embedded)
        chats = []
        others = [kind for kind in kinds if kind != "image"]
        for text, answer, turns in zip(texts, endings, conversations, strict=True):
            content = ["image"] * len(turns.images) + others
            chats.append(
                prompts.prompt_of(
                    self.processor, self.name, text, answer, content, turns.history, system
                )
            )
        if kinds == ("image",):  # a pocket's clips and sounds have a picture's mark too
            prompts.require_marks(self.processor, chats, conversations, names)
        if suffixed:
            arguments["suffix"] = list(answers)
        inputs = prompts.inputs_of(self.processor, chats, arguments, names)
        inputs.pop("labels", None)
        replaced = inputs.pop("text_replacement_offsets", None)
        batch = Batch(dict(padding_first(inputs))).to(self.device, self.dtype)
        ids = batch["input_ids"]
        placeholders = prompts.placeholders_of(self.placeholders, kinds)
        places = {}
        for kind in kinds:
            if kind in placeholders:
                has_one = [kind != "image" or bool(turns.pictures) for turns in conversations]
                places[placeholders[kind]] = has_one
        prompts.require_places(self.processor, ids, places, texts, names)
        require_embedded(self.tokenizer, ids, embedded, placeholders.values())
        questions = [prompts.spoken(self.processor, text) for text in texts]
        batch.spans = label(batch, placeholders, self.tokenizer, questions, answers)
        self._label_turns(batch, conversations, replaced)
        return batch

    def _label_turns(
        self, batch: Batch, conversations: Sequence[Conversation], replaced: object
    ) -> None:
        """Label earlier turns and number pictures, where there is more than one text and picture.

        ``replaced`` is what the processor says of the places of pictures, None where it does not.
        """
        batch.single = all(turns.single for turns in conversations)
        texts = []
        for turns in conversations:
            parts = []
            for kind, number, text in turns.parts:
                parts.append((kind, number, prompts.spoken(self.processor, text)))
            texts.append(parts)
        if batch.single and not any(texts):
            batch.numbers = (batch.spans == SPANS.index("image")).long()
            return
        sizes = self._picture_sizes(batch, conversations, replaced)
        label_turns(batch, self.tokenizer, texts, sizes)

    def _picture_sizes(
        self, batch: Batch, conversations: Sequence[Conversation], replaced: object
    ) -> list[list[int]]:
        """How many positions each picture has, row by row; nothing where that is not known."""
        token = self.placeholders.get("image")
        sizes = []
        for row, turns in enumerate(conversations):
            total = int((batch.spans[row] == SPANS.index("image")).sum())
            if token is None or not total:
                counts = []
            elif len(turns.pictures) == 1:
                counts = [total]
            elif replaced:
                mark = self.tokenizer.convert_ids_to_tokens(token)
                counts = [part["replacement"].count(mark) for part in replaced[row]]
            else:
                counts = run_lengths(batch["input_ids"][row], token)
            sizes.append(counts if len(counts) == len(turns.pictures) else [])
        return sizes

    def batch_of(
        self,
        samples: Sequence[Sample],
        texts: Sequence[str],
        answers: Sequence[str] | None = None,
        history: Sequence[Sequence[Turn | tuple]] | None = None,
        system: str | None = None,
    ) -> Batch:
        """Make model inputs for what samples show, pictures, clips or sounds, and texts about them.

        It raises as :meth:`batch` does.

        Parameters
        ----------
        samples : sequence of Sample
            As ``load_samples`` gives them.
        texts : sequence of str
            One for each sample.
        answers : sequence of str, optional
            One for each sample, put after its prompt; none by default.
        history : sequence of sequences of Turn, optional
            Earlier turns for each sample; none by default.
        system : str, optional
            A system prompt for all.

        Returns
        -------
        Batch
            As :meth:`batch` returns it. Errors call the samples by their ids.

        Raises
        ------
        InputError
            If the samples are of different modalities.

        Examples
        --------
        >>> inputs = vlm.batch_of(samples[:2], ["Describe the picture."] * 2)
        >>> inputs.mask("image").sum(dim=1).tolist()
        [16, 16]
        """
        content = {"images": None} | media(samples)
        names = [sample.id for sample in samples]
        return self.batch(
            **content, texts=texts, answers=answers, names=names, history=history, system=system
        )

    def prepare(
        self, inputs: Mapping[str, object], spans: Int[Tensor, "b t"] | None = None
    ) -> Batch:
        """Make a batch of inputs that were made elsewhere, left-padded.

        Use it for a model without a processor, or for text alone.

        Parameters
        ----------
        inputs : Mapping
            What the model's ``forward`` takes: ``input_ids`` (b, t), ``attention_mask`` (b, t) and
            what belongs to the pictures.
        spans : Tensor, optional
            Integers (b, t), the index into ``SPANS`` of each position; by default every position
            that is no placeholder and no padding counts as question.

        Returns
        -------
        Batch
            The inputs on the model's device, with their spans.

        Raises
        ------
        InputError
            If a row ends with padding.

        Examples
        --------
        >>> inputs = vlm.tokenizer(["The sky is", "Two words"], padding=True, return_tensors="pt")
        >>> vlm.prepare(inputs).mask("question").any(dim=1).tolist()
        [True, True]
        """
        support.require_left_padding(inputs.get("attention_mask"))
        batch = Batch(dict(inputs)).to(self.device, self.dtype)
        batch.spans = label(batch, self.placeholders) if spans is None else spans.to(self.device)
        return batch

    @contextmanager
    def run(self, batch: Batch) -> Iterator[None]:
        """Let hooks know, while the model runs, which batch it is and where its spans are.

        Use it around your own call of ``vlm.model``; :meth:`forward` and :meth:`generate` use it
        themselves. The model runs in evaluation mode.

        Parameters
        ----------
        batch : Batch
            What goes through the model inside the block.

        Returns
        -------
        context manager
            Its block sees the batch as ``vlm.running``.

        Raises
        ------
        InputError
            If the batch lacks a picture that the model cannot do without, or token type ids without
            which it would silently use wrong positions or masks.
        DeviceMemoryError
            If the device runs out of memory, with what to lower.

        Examples
        --------
        >>> with vlm.run(batch):
        ...     vlm.running is batch
        True
        >>> vlm.running is None
        True
        """
        support.require_arguments(self.model, batch)
        support.require_types(batch, self.accepts, self.placeholders)
        previous, self.running = self.running, batch
        try:
            with support.evaluating(self.model):
                yield
        except torch.OutOfMemoryError as cause:
            raise DeviceMemoryError(len(batch["input_ids"]), self.dtype) from cause
        finally:
            self.running = previous

    @torch.no_grad()  # not inference_mode: its tensors could never be trained on
    def forward(self, batch: Batch, logits: bool = True, **options: object) -> ModelOutput:
        """Run the model once over a batch, without gradients.

        Parameters
        ----------
        batch : Batch
            The inputs, as :meth:`batch` makes them.
        logits : bool
            Whether logits of all positions are computed (the default). False computes those of the
            last position only, where the model can, which saves time and memory.
        **options : object
            Further arguments of the model's ``forward``, such as ``output_hidden_states=True``.

        Returns
        -------
        ModelOutput
            Of transformers: ``logits`` (b, t, vocabulary) and what the options ask for.

        Examples
        --------
        >>> tuple(vlm.forward(batch, logits=False).logits.shape)
        (4, 1, 49152)
        """
        with self.run(batch):
            options = options if logits else {**self._last_logits, **options}
            return self.model(**batch, **options)

    @torch.no_grad()
    def generate_ids(
        self, batch: Batch, max_new_tokens: int = 32, **options: object
    ) -> Int[Tensor, "b new"]:
        """Generate ids after a batch's prompts.

        Generation is greedy unless ``options`` say otherwise. The ``generation_config.json`` of the
        model's folder says only which tokens end, fill and are suppressed.

        Parameters
        ----------
        batch : Batch
            The prompts, as :meth:`batch` makes them.
        max_new_tokens : int
            At most so many tokens are generated after each prompt; 32 by default.
        **options : object
            Of transformers' ``generate``, such as ``num_beams``.

        Returns
        -------
        Tensor
            Integers (b, new), the prompts left out. Rows that have ended are padded.

        Raises
        ------
        InputError
            If the logits are NaN or infinite, as those of damaged weights.

        Examples
        --------
        >>> tuple(vlm.generate_ids(batch, max_new_tokens=1).shape)
        (4, 1)
        """
        # compiled generation ignores hooks that are registered later
        options = {
            "do_sample": False,
            "disable_compile": True,
            "pad_token_id": padding(self.model, self.tokenizer),
            **self._last_logits,
            **options,
        }
        finite = Finite()
        options["logits_processor"] = [*(options.get("logits_processor") or ()), finite]
        with self.run(batch), greedy(self.model):
            ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, **options)
        finite.require()
        return after_prompts(getattr(ids, "sequences", ids), batch["input_ids"])

    def generate(
        self,
        images: Sequence[object] | None,
        texts: Sequence[str],
        max_new_tokens: int = 32,
        batch_size: int = 16,
        progress: bool = False,
        videos: Sequence[object] | None = None,
        audio: Sequence[object] | None = None,
        decoding: Callable[..., LogitsProcessor] | None = None,
        history: Sequence[Sequence[Turn | tuple]] | None = None,
        system: str | None = None,
    ) -> list[str]:
        """Return greedy answers to texts about pictures (videos, sounds), one for each text.

        It raises as :meth:`batch` does. A picture that several texts are about (the same object in
        ``images``) runs through a LLaVA once, which takes about half the time. Where an
        intervention is in force that depends on positions, and in other models, each prompt runs
        whole.

        Parameters
        ----------
        images : sequence or None
            A picture, or a list of pictures, for each text, as for :meth:`batch`. None where
            nothing is seen.
        texts : sequence of str
            The questions or instructions.
        max_new_tokens : int
            At most so many tokens an answer; 32 by default.
        batch_size : int
            Texts that run through the model together, 16 by default. Lower it where memory runs
            out.
        progress : bool
            Whether a progress bar is shown; not by default.
        videos : sequence, optional
            A clip for each text: a list of frames.
        audio : sequence, optional
            A sound for each text: a 1-d array of samples.
        decoding : callable, optional
            What changes the logits of each step, such as ``methods.decoding.VCD()``. For each batch
            it is called with this model, the batch, its texts, and ``images``, ``videos`` and
            ``audio``; it returns a processor of transformers. By default nothing changes them.
        history : sequence of sequences of Turn, optional
            Earlier turns for each text, as for :meth:`batch`; none by default.
        system : str, optional
            A system prompt for all.

        Returns
        -------
        list of str
            The answers in the order of the texts, without special tokens.

        Examples
        --------
        >>> answers = vlm.generate([samples[0].image], ["Is there a frog?"], max_new_tokens=2)
        >>> len(answers), isinstance(answers[0], str)
        (1, True)
        """
        prompts.counted(texts, minimum=0, image=images, video=videos, audio=audio)
        # before a long run rather than in it
        prompts.require_texts(self.processor, texts, None, range(len(texts)))
        require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
        pictures: Sequence[object] = [None] * len(texts)
        require_history(texts, history)
        several = history is not None
        for picture in () if images is None else images:
            several = several or picture is None or isinstance(picture, (list, tuple))
        if images is not None and not several and shareable(self.model, self.active):
            pictures = images
        parts = list(by_picture(pictures, batch_size))
        answers = [""] * len(texts)
        for rows in tqdm(parts, "generate", unit="batch", leave=False, disable=not progress):
            part = taken(texts, rows)
            media = {"images": images, "videos": videos, "audio": audio}
            media = {name: taken(values, rows) for name, values in media.items()}
            if history is not None:
                media["history"] = taken(history, rows)
            if system is not None:
                media["system"] = system
            batch = self.batch(texts=part, names=rows, **media)
            processors = [] if decoding is None else [decoding(self, batch, part, **media)]
            ids = self._generate_shared(
                batch, taken(pictures, rows), max_new_tokens, logits_processor=processors
            )
            decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for row, text in zip(rows, decoded, strict=True):
                answers[row] = text.strip()
        return answers

    def _generate_shared(
        self,
        batch: Batch,
        pictures: Sequence[object],
        max_new_tokens: int,
        **options: object,
    ) -> Int[Tensor, "b new"]:
        """Return the ids that :meth:`generate_ids` gives, computed once for equal pictures.

        The prompts of a LLaVA begin alike up to the end of the picture. This beginning runs once a
        picture, and its keys and values serve every text about it. The numbers agree with those of
        whole prompts up to rounding. Equal pictures are the same object; where one is None, nothing
        is to be shared.
        """
        row_of = {id(picture): row for row, picture in enumerate(pictures)}
        alone = len(row_of) == len(pictures) or any(picture is None for picture in pictures)
        start = None if alone else common_beginning(batch)
        if start is None or not len(start):
            return self.generate_ids(batch, max_new_tokens, **options)
        first = self.prepare(beginnings(batch, start, list(row_of.values())))
        cache = self.forward(first, logits=False, use_cache=True).past_key_values
        number_of = {picture: number for number, picture in enumerate(row_of)}
        numbers = [number_of[id(picture)] for picture in pictures]
        cache.batch_select_indices(torch.tensor(numbers, device=self.device))
        rest = self.prepare(continued(batch, start))
        return self.generate_ids(rest, max_new_tokens, past_key_values=cache, **options)

    def spans(
        self,
        images: Sequence[object] | None,
        texts: Sequence[str],
        answers: Sequence[str] | None = None,
        history: Sequence[Sequence[Turn | tuple]] | None = None,
        system: str | None = None,
    ) -> pd.DataFrame:
        """Return a table of what stands at each position of the prompts for pictures and texts.

        ``question`` is the text asked, ``answer`` the text after the assistant's mark, ``template``
        the chat's own marks; ``demonstration`` and ``demonstration answer`` are those of earlier
        turns.

        Parameters
        ----------
        images : sequence or None
            A picture for each text, as for :meth:`batch`.
        texts : sequence of str
            The questions or instructions.
        answers : sequence of str, optional
            An answer for each text; none by default.
        history : sequence of sequences of Turn, optional
            Earlier turns for each text, as for :meth:`batch`; none by default.
        system : str, optional
            A system prompt for all.

        Returns
        -------
        DataFrame
            A row for each position: sample and position (from 0), token_id, token (its text) and
            span (one of ``SPANS``). Where there are several pictures or earlier turns, ``number``
            says which one it is.

        Examples
        --------
        >>> table = vlm.spans([samples[0].image], ["What is it?"])
        >>> table["span"].unique().tolist()
        ['template', 'image', 'question']
        >>> int((table["span"] == "image").sum())
        16
        """
        batch = self.batch(images, texts, answers, history=history, system=system)
        return positions(batch, self.tokenizer)

    @torch.no_grad()
    def unembed(
        self, states: Float[Tensor, "*n d"], norm: bool = True
    ) -> Float[Tensor, "*n vocabulary"]:
        r"""Return the logits of the next token read off a state of the residual stream.

        This is the logit lens: :math:`W_U \, \mathrm{norm}(h)`, with the scaling or capping of
        logits that the model applies itself (nostalgebraist, 2020).

        Parameters
        ----------
        states : Tensor
            States (..., d) of any layer, for instance from ``capture``.
        norm : bool
            Whether the final norm comes before the unembedding, as in the model itself (the
            default). False for states that are normed already.

        Returns
        -------
        Tensor
            Logits (..., vocabulary) in float32.

        Examples
        --------
        >>> import torch
        >>> tuple(vlm.unembed(torch.ones(2, vlm.width)).shape)
        (2, 49152)
        """
        return unembedded(self.model, states.to(self.dtype), self._logit_rules, norm)

    @property
    def _last_logits(self) -> dict[str, Tensor]:
        # transformers' own logits_to_keep=1 cuts a view, for which a CPU copies the unembedding
        # once a row (four times slower in bfloat16)
        return {"logits_to_keep": torch.tensor([-1])} if "logits_to_keep" in self.accepts else {}

    def token_ids(self, word: str) -> Int[Tensor, "k"]:
        """Return the ids of a word as it stands inside a sentence (with its leading space).

        Parameters
        ----------
        word : str
            The word, without the space.

        Returns
        -------
        Tensor
            Integers (k,), one for each piece that the tokenizer cuts the word into.

        Examples
        --------
        >>> vlm.tokenizer.decode(vlm.token_ids("sky"))
        ' sky'
        """
        return torch.tensor(self.tokenizer(f" {word}", add_special_tokens=False).input_ids)
