"""Demonstrations: chosen as brute force does, paired over conditions, never the query's own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from tests.support.tiny import tiny_llava
from xlvlms_tutorial.data import Question, Sample
from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.in_context import (
    Episode,
    Example,
    ablate,
    as_prompts,
    episodes,
    examples,
)
from xlvlms_tutorial.methods.in_context.episodes import CHANGES, PARTS, SELECTIONS

COLOURS = ("red", "blue", "green", "grey")
QUESTIONS = ("What colour is the key ?", "Is there a red key in the picture ?")


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (20, 10), (level % 256, 40, 60))


def made(n: int, prefix: str, shift: int = 0) -> list[Example]:
    """Examples with pictures, two kinds of questions and four answers."""
    items = []
    for k in range(n):
        kind = (k + shift) % 4
        items.append(Example(f"{prefix}{k}", picture(k), QUESTIONS[k % 2], COLOURS[kind]))
    return items


SUPPORT, QUERIES = made(12, "s"), made(5, "q", shift=1)


def rows(n: int, d: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def chosen(episode: Episode) -> list[str]:
    return [example.id for example in episode.demonstrations]


# selection


@pytest.mark.parametrize("shots", [1, 4, 12])
def test_retrieval_is_that_of_scikit_learn_with_the_most_similar_last(shots):
    support, queries = rows(12), rows(5, seed=1)
    search = NearestNeighbors(n_neighbors=shots, metric="cosine", algorithm="brute").fit(support)
    expected = search.kneighbors(queries, return_distance=False)
    result = episodes(SUPPORT, QUERIES, shots, "rices", embed=(support, queries))
    for episode, numbers in zip(result, expected, strict=True):
        assert chosen(episode) == [SUPPORT[k].id for k in reversed(numbers)]
        assert [example.id for example in episode.ranked] == [SUPPORT[k].id for k in numbers]


def test_a_function_embeds_each_picture_once_and_gives_what_arrays_give():
    seen = []

    def embed(pictures):
        seen.extend(pictures)
        return torch.tensor([[float(p.getpixel((0, 0))[0]), 50.0] for p in pictures])

    support = [*SUPPORT, Example("s0", picture(0), "Is there ?", "no")]
    arrays = tuple(
        np.array([[example.picture.getpixel((0, 0))[0], 50.0] for example in part])
        for part in (support, QUERIES)
    )
    by_function = episodes(support, QUERIES, 3, "rices", embed=embed)
    assert by_function == episodes(support, QUERIES, 3, "rices", embed=arrays)
    assert len(seen) == 12 + 5


def test_equal_similarities_are_taken_in_the_order_of_the_support():
    result = episodes(SUPPORT, QUERIES[:1], 3, "rices", embed=(np.ones((12, 2)), np.ones((1, 2))))
    assert chosen(result[0]) == ["s2", "s1", "s0"]
    zero = episodes(SUPPORT, QUERIES[:1], 2, "rices", embed=(np.zeros((12, 2)), np.ones((1, 2))))
    assert chosen(zero[0]) == ["s1", "s0"]


def test_text_and_oracle_retrieval_compare_words_or_as_they_are_told():
    by_text = episodes(SUPPORT, QUERIES, 6, "rices_text")
    for episode in by_text:
        assert {example.question for example in episode.demonstrations} == {episode.query.question}
    oracle = episodes(SUPPORT, QUERIES, 3, "oracle")
    for episode in oracle:
        assert {example.answer for example in episode.demonstrations} == {episode.query.answer}
    lengths = episodes(
        SUPPORT, QUERIES[:1], 3, "oracle", embed=lambda texts: [[len(text), 4.0] for text in texts]
    )
    assert {len(example.answer) for example in lengths[0].demonstrations} == {4}


def test_random_demonstrations_are_drawn_for_each_query_evenly():
    result = episodes(SUPPORT, made(400, "q"), 3)
    counts = {example.id: 0 for example in SUPPORT}
    for episode in result:
        assert len(set(chosen(episode))) == 3
        for name in chosen(episode):
            counts[name] += 1
    # 400 draws of 3 in 12: 100 each, five standard deviations of sqrt(400 / 4 * 3 / 4)
    assert max(abs(count - 100) for count in counts.values()) < 5 * 75**0.5
    assert len({tuple(chosen(episode)) for episode in result}) > 200


@pytest.mark.parametrize("select", SELECTIONS)
def test_fewer_shots_and_the_other_order_are_paired(select):
    options = {"embed": (rows(12), rows(5, seed=1))} if select == "rices" else {}
    more = episodes(SUPPORT, QUERIES, 5, select, seed=3, **options)
    fewer = episodes(SUPPORT, QUERIES, 2, select, seed=3, **options)
    reverse = episodes(SUPPORT, QUERIES, 5, select, order="nearest_first", seed=3, **options)
    for long, short, back in zip(more, fewer, reverse, strict=True):
        assert chosen(long)[-2:] == chosen(short)
        assert chosen(back) == chosen(long)[::-1] and back.ranked == long.ranked
    assert more == episodes(SUPPORT, QUERIES, 5, select, seed=3, **options)
    if select == "random":
        assert more != episodes(SUPPORT, QUERIES, 5, select, seed=4)


@given(
    st.integers(0, 6),
    st.sampled_from(SELECTIONS),
    st.integers(0, 99),
    st.lists(st.sampled_from(COLOURS), min_size=6, max_size=9),
)
def test_each_query_has_different_supports_and_never_itself(shots, select, seed, answers):
    support = [Example(f"s{k}", None, "Which ?", answer) for k, answer in enumerate(answers)]
    options = {"embed": (rows(len(support), seed=seed), rows(5, seed=seed + 1))}
    options = options if select == "rices" else {}
    for episode, query in zip(
        episodes(support, QUERIES, shots, select, seed=seed, **options), QUERIES, strict=True
    ):
        names = chosen(episode)
        assert len(set(names)) == len(names) == shots
        assert episode.query is query and query.id not in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 13}, "12 supports for 13 shots"),
        ({"shots": -1}, "shots=-1"),
        ({"shots": True}, "shots=True"),
        ({"select": "knn"}, "unknown selection 'knn'; allowed: 'random', 'rices', 'rices_text'"),
        ({"order": "random"}, "unknown order 'random'"),
        ({"queries": []}, "no queries"),
        ({"queries": [SUPPORT[3], QUERIES[0]]}, "1 pictures are both support and query, such as"),
        ({"support": [Example("x", None, "Which ?", " ")] * 3}, "the answer of 'x' is ' '"),
        (
            {"queries": [Example("q", None, "Which ?", "")], "select": "oracle"},
            "the answer of 'q' is ''",
        ),
        ({"select": "rices"}, "rices without an embedding of pictures; give embed="),
        ({"select": "rices", "embed": (rows(11), rows(5))}, r"\(11, 3\) of 12 supports"),
        ({"select": "rices", "embed": (rows(12), rows(5, 2))}, "widths of embeddings differ"),
        ({"select": "rices", "embed": (rows(12) * np.nan, rows(5))}, "finite"),
        ({"select": "rices", "embed": lambda pictures: rows(3)}, "3 embeddings of 17 pictures"),
        (
            {"select": "rices", "embed": rows, "queries": [Example("q", None, "Which ?", "a")]},
            "'q' has no picture",
        ),
    ],
)
def test_what_no_episodes_can_be_made_of_is_refused(arguments, message):
    options = {"support": SUPPORT, "queries": QUERIES, "shots": 2} | arguments
    with pytest.raises(InputError, match=message):
        episodes(**options)


# ablation


@pytest.mark.parametrize("order", ["nearest_last", "nearest_first"])
@pytest.mark.parametrize("by", CHANGES)
@pytest.mark.parametrize("part", PARTS)
def test_an_ablation_changes_one_part_of_the_demonstrations_alone(part, by, order):
    intact = episodes(SUPPORT, QUERIES, 4, order=order)
    changed = ablate(intact, part, by, seed=5)
    name = PARTS[part]
    others = [other for other in ("id", *PARTS.values()) if other != name]
    for before, after in zip(intact, changed, strict=True):
        assert after.query is before.query and after.order == before.order
        shown = {example.id for example in (*before.demonstrations, before.query)}
        for old, new in zip(before.demonstrations, after.demonstrations, strict=True):
            assert all(getattr(old, other) is getattr(new, other) for other in others)
            value = getattr(new, name)
            if by == "remove":
                assert not value
            elif by == "blank" and part == "images":
                assert value.size == old.picture.size and len(value.getcolors()) == 1
            elif by == "blank":
                assert value == "..."
            else:
                sources = {e.id for e in SUPPORT if getattr(e, name) is value} - shown
                assert sources
    assert changed == ablate(intact, part, by, seed=5)
    assert intact == episodes(SUPPORT, QUERIES, 4, order=order)


def test_the_same_demonstration_gets_the_same_other_part_in_either_order():
    last, first = (
        ablate(episodes(SUPPORT, QUERIES, 4, order=order), "images", "swap")
        for order in ("nearest_last", "nearest_first")
    )
    assert [episode.ranked for episode in last] == [episode.ranked for episode in first]


@pytest.mark.parametrize(
    ("part", "by", "message"),
    [
        ("captions", "remove", "unknown part 'captions'; allowed: 'images', 'questions'"),
        ("images", "shuffle", "unknown change 'shuffle'; allowed: 'remove', 'swap', 'blank'"),
        ("questions", "swap", "all questions are 'Which .': swapping changes nothing"),
        ("images", "swap", "no demonstration about another picture for the query 'q'"),
    ],
)
def test_what_cannot_be_ablated_is_refused(part, by, message):
    shown = tuple(Example(f"s{k}", picture(k), "Which ?", "red") for k in range(2))
    one = [Episode(Example("q", None, "Which ?", "red"), shown)]
    with pytest.raises(InputError, match=message):
        ablate(one, part, by)
    with pytest.raises(InputError, match="episodes without demonstrations"):
        ablate([Episode(QUERIES[0], ())], "images")


# prompts


def test_episodes_become_conversations_whose_parts_are_labelled():
    vlm = tiny_llava()
    intact = episodes(SUPPORT, QUERIES, 2, seed=1)
    batch = vlm.batch(**as_prompts(intact))
    for row, episode in enumerate(intact):
        for number, example in enumerate(episode.demonstrations, start=1):
            for kind, text in [("demonstration", example.question), ("answer", example.answer)]:
                span = kind if kind == "demonstration" else "demonstration answer"
                ids = batch["input_ids"][row][batch.mask(f"{span} {number}")[row]]
                assert ids.tolist() == vlm.tokenizer(text).input_ids
        question = batch["input_ids"][row][batch.mask("question")[row]]
        assert question.tolist() == vlm.tokenizer(episode.query.question).input_ids
    assert batch.mask("image").sum(dim=1).tolist() == [12] * 5
    assert batch.mask("image 3").sum(dim=1).tolist() == [4] * 5
    bare = vlm.batch(**as_prompts(ablate(intact, "images")))
    assert bare.mask("image").sum(dim=1).tolist() == [4] * 5
    assert bare["input_ids"].shape[1] == batch["input_ids"].shape[1] - 8


def test_every_condition_runs_and_zero_shots_are_the_question_alone():
    vlm = tiny_llava()
    intact = episodes(SUPPORT, QUERIES[:2], 2)
    for part in PARTS:
        for by in CHANGES:
            assert len(vlm.generate(**as_prompts(ablate(intact, part, by)), max_new_tokens=1)) == 2
    bare = vlm.batch(**as_prompts(episodes(SUPPORT, QUERIES, 0)))
    plain = vlm.batch([query.image for query in QUERIES], [query.question for query in QUERIES])
    assert torch.equal(bare["input_ids"], plain["input_ids"])
    assert torch.equal(bare.spans, plain.spans)


def test_a_model_without_a_chat_template_is_told_where_pictures_go():
    vlm = tiny_llava()
    vlm.processor.chat_template = None
    intact = episodes(SUPPORT, QUERIES, 2)
    with pytest.raises(InputError, match="no chat template"):
        vlm.batch(**as_prompts(intact))
    batch = vlm.batch(**as_prompts(intact, mark="<image>"))
    assert batch.mask("image 3").sum(dim=1).tolist() == [4] * 5
    assert batch.mask("demonstration answer 2").any(dim=1).all()


# examples


def test_examples_are_the_questions_of_samples_or_their_captions():
    questions = (Question("colour", "What ?", "red"), Question("count", "Is ?", "two"))
    samples = [Sample(f"s{k}", picture(k), ("A key .",), questions) for k in range(2)]
    made_examples = examples(samples, "count")
    assert [(e.id, e.question, e.answer) for e in made_examples] == [
        ("s0", "Is ?", "two"),
        ("s1", "Is ?", "two"),
    ]
    assert [e.answer for e in examples(samples, ("caption", "colour"))] == ["A key .", "red"] * 2
    assert [e.question for e in examples(samples)] == ["Describe the picture."] * 2
    with pytest.raises(InputError, match="no questions of type mood; there are: caption, colour"):
        examples(samples, "mood")


def test_a_picture_may_be_made_when_it_is_used():
    example = Example("s", lambda: picture(7), "What ?", "red")
    assert example.picture.getpixel((0, 0)) == (7, 40, 60)
    assert Example("s", None, "What ?", "red").picture is None
