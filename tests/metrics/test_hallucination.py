import jaxtyping
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.metrics.answers import answer_table
from xlvlms_tutorial.metrics.hallucination import chair, pope
from xlvlms_tutorial.metrics.intervals import bootstrap, proportion
from xlvlms_tutorial.samples import Question

STRATA = ("random", "popular", "adversarial")


def presence(answers, predictions, strata=("random",)):
    questions = [
        Question("presence", "Is there a bee?", a, "bee", strata[i % len(strata)])
        for i, a in enumerate(answers)
    ]
    return answer_table(predictions, questions)


def test_pope_agrees_with_scikit_learn_in_every_stratum():
    rng = np.random.default_rng(0)
    answers, labels = (
        rng.choice(["yes", "no"], 90),
        rng.choice(["Yes.", "No, there is not."], 90, p=[0.7, 0.3]),
    )
    table = pope(presence(answers.tolist(), labels.tolist(), STRATA))
    assert table.index.tolist() == [*STRATA, "overall"]
    for k, name in enumerate(table.index):
        part = slice(None) if name == "overall" else slice(k, None, 3)
        truth, yes = answers[part] == "yes", np.char.startswith(labels[part], "Yes")
        row = table.loc[name]
        scores = row[["accuracy", "precision", "recall", "f1", "yes_ratio"]]
        assert scores.tolist() == pytest.approx(
            [
                accuracy_score(truth, yes),
                precision_score(truth, yes),
                recall_score(truth, yes),
                f1_score(truth, yes),
                yes.mean(),
            ]
        )
        assert (row["yes_ratio_low"], row["yes_ratio_high"]) == (
            proportion(yes).low,
            proportion(yes).high,
        )
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
        assert row["n"] == len(yes)


def test_precision_recall_and_f1_have_the_intervals_of_resampled_scenes():
    rng = np.random.default_rng(1)
    answers = rng.choice(["yes", "no"], 60).tolist()
    predictions = rng.choice(["yes", "no"], 60).tolist()
    scenes = np.repeat(np.arange(20), 3)
    row = pope(presence(answers, predictions), scenes, seed=3).loc["overall"]
    truth, said = np.array(answers) == "yes", np.array(predictions) == "yes"
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    for name, score in scores.items():
        expected = bootstrap(
            np.stack([truth, said], axis=1).astype(float),
            scenes,
            lambda rows, score=score: score(rows[:, 0], rows[:, 1]),
            n_resamples=400,
        )
        assert row[name] == pytest.approx(expected.value)
        assert row[f"{name}_low"] == pytest.approx(expected.low, abs=0.04)
        assert row[f"{name}_high"] == pytest.approx(expected.high, abs=0.04)


def test_intervals_of_independent_answers_are_wilsons():
    row = pope(presence(["yes"] * 6 + ["no"] * 4, ["yes"] * 8 + ["no"] * 2)).loc["overall"]
    precision = proportion([True] * 6 + [False] * 2)
    assert (row["precision_low"], row["precision_high"]) == (precision.low, precision.high)
    recall = proportion([True] * 6)
    assert (row["recall_low"], row["recall_high"]) == (recall.low, 1.0)


def test_an_unclear_answer_is_neither_right_nor_a_yes():
    row = pope(
        presence(["no", "yes", "yes", "no"], ["A frog on the grass.", "It is there.", "yes", "no"])
    ).loc["overall"]
    assert row[["accuracy", "yes_ratio", "unclear", "recall"]].tolist() == [0.5, 0.25, 0.5, 0.5]


def test_undefined_precision_is_nan_and_not_zero():
    row = pope(presence(["yes", "no"], ["no", "no"])).loc["overall"]
    assert np.isnan(row[["precision", "precision_low", "precision_high"]].astype(float)).all()
    assert row["recall"] == row["f1"] == 0


def test_pope_looks_at_presence_questions_only_and_groups_by_scene():
    table = answer_table(
        ["yes", "red", "no", "no"] * 6,
        [
            Question("presence", "?", "yes", "bee", "random"),
            Question("colour", "?", "blue", "key"),
            Question("presence", "?", "yes", "fly", "popular"),
            Question("presence", "?", "no", "fly", "popular"),
        ]
        * 6,
    )
    scenes = np.repeat(np.arange(6), 4)
    result = pope(table, scenes)
    assert result["n"].tolist() == [6, 12, 18]
    expected = bootstrap([True, False, True] * 6, np.repeat(np.arange(6), 3))
    assert result.loc["overall", ["accuracy_low", "accuracy_high"]].tolist() == [
        expected.low,
        expected.high,
    ]
    with pytest.raises(InputError, match="presence"):
        pope(table[table["type"] == "colour"])
    with pytest.raises(InputError):
        pope(table, scenes[1:])


WORDS = ("robot", "key", "box", "bee")


def test_chair_counts_absent_objects_and_captions_that_name_one():
    captions = [
        "A robot beside two keys and a box.",
        "A bee.",
        "Nothing at all.",
        "Robots and a robot.",
    ]
    objects = [{"robot", "key"}, {"bee"}, {"box"}, {"key"}]
    table = chair(captions, objects, WORDS)
    # box of 3 named, none of 1, robot of 1 (once a caption)
    assert table["value"].tolist() == pytest.approx([2 / 5, 2 / 4])
    assert table["n"].tolist() == [5, 4]
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_chair_takes_synonyms():
    synonyms = {"robot": ("android",), "key": ()}
    assert chair(["An android."], [{"robot"}], synonyms).loc["CHAIR_i", "value"] == 0
    assert chair(["An android."], [{"key"}], synonyms).loc["CHAIR_s", "value"] == 1


def test_chair_without_a_named_object_is_undefined():
    table = chair(["Hm.", "Well."], [{"bee"}, {"box"}], WORDS)
    assert np.isnan(table.loc["CHAIR_i", "value"])
    assert table.loc["CHAIR_i", "n"] == 0
    assert table.loc["CHAIR_s", "value"] == 0


def test_chair_refuses_what_does_not_fit():
    with pytest.raises(InputError):
        chair(["a bee"], [], WORDS)
    with pytest.raises(InputError):
        chair([], [], WORDS)
    with pytest.raises(InputError, match="zebra"):
        chair(["a bee"], [{"zebra"}], WORDS)


@pytest.mark.parametrize("spellings", [("Yes", "No"), ("YES.", " no "), ("Yes.", "NO")])
def test_correct_answers_count_in_any_case(spellings):
    labels = ["Yes", "No", "no", "yes"] * 2
    plain, written = (
        pope(presence(list(answers) * 4, labels)) for answers in (("yes", "no"), spellings)
    )
    assert written.loc["overall"].to_dict() == plain.loc["overall"].to_dict()
    perfect = pope(presence(list(spellings) * 4, ["Yes", "No"] * 4)).loc["overall"]
    assert perfect[["accuracy", "precision", "recall", "f1", "yes_ratio"]].tolist() == [
        1,
        1,
        1,
        1,
        0.5,
    ]


@pytest.mark.parametrize("answer", ["maybe", "", "true", "1", "dog", "No, there is not."])
def test_presence_questions_of_other_answers_are_refused(answer):
    with pytest.raises(InputError, match="yes and no"):
        pope(presence(["yes", answer], ["yes", "no"]))


@pytest.mark.parametrize("lacking", ["type", "stratum", "answer", "prediction", "correct"])
def test_pope_names_the_column_that_a_table_lacks(lacking):
    with pytest.raises(InputError, match=f"no column '{lacking}'"):
        pope(presence(["yes", "no"], ["yes", "no"]).drop(columns=lacking))


COCO = {
    "person": ("man", "woman", "baby", "adult", "passenger", "policeman"),
    "dog": ("puppy",),
    "hot dog": (),
    "bear": ("panda",),
    "cup": (),
    "teddy bear": (),
    "bicycle": ("bike",),
    "motorcycle": ("motor bike",),
    "airplane": ("jet", "plane"),
    "bird": ("goose", "duck"),
    "chair": ("seat",),
    "toilet": (),
    "train": (),
    "elephant": (),
    "bowl": ("plate",),
    "tie": (),
    "knife": (),
    "traffic light": ("street light",),
    "sheep": ("lamb",),
    "mouse": (),
    "wine glass": (),
}


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A hot dog on a plate with a cup of coffee.", {"hot dog", "bowl", "cup"}),
        ("A dog eats a hot  dog.", {"dog", "hot dog"}),
        ("Two HOT DOGS.", {"hot dog"}),
        ("A teddy bear sits on a bear.", {"teddy bear", "bear"}),
        ("Teddy\nbears.", {"teddy bear"}),
        ("Two people riding a motor bike.", {"person", "motorcycle"}),
        ("A motor bike and a bike.", {"motorcycle", "bicycle"}),
        ("A passenger jet on the runway.", {"airplane"}),
        ("A passenger train with passengers.", {"train", "person"}),
        ("A passenger, a jet.", {"person", "airplane"}),
        ("A baby elephant and an adult elephant.", {"elephant"}),
        ("A baby with an elephant.", {"person", "elephant"}),
        ("Baby animals in a zoo.", set()),
        ("An adult holds a baby.", {"person"}),
        ("A group of geese near a lake.", {"bird"}),
        ("Three knives, two mice and a sheep.", {"knife", "mouse", "sheep"}),
        ("Policemen and women.", {"person"}),
        ("A white toilet seat.", {"toilet"}),
        ("A man in a bow tie.", {"person", "tie"}),
        ("A batter at home plate.", set()),
        ("Weeds on the train tracks.", set()),
        ("A train on train tracks.", {"train"}),
        ("Street lights over wine glasses.", {"traffic light", "wine glass"}),
        ("The dogged jetlag.", set()),
    ],
)
def test_the_longest_name_wins(caption, objects):
    rates = chair([caption], [objects], COCO)["value"]
    assert rates["CHAIR_s"] == 0
    for name in COCO.keys() - objects:  # none besides is named
        assert chair([caption], [set(COCO) - {name}], COCO).loc["CHAIR_s", "value"] == 0
    if objects:
        assert chair([caption], [set()], COCO)["value"].tolist() == [1, 1]
        assert chair([caption], [set()], COCO).loc["CHAIR_i", "n"] == len(objects)


def test_names_may_be_shared_and_written_with_blanks():
    words = {"motorcycle": (" motor bike",), "bat": (), "club": ("bat",)}
    assert chair(["A motor  bike and a bat."], [set()], words).loc["CHAIR_i", "n"] == 3


@pytest.mark.parametrize(
    "words",
    [[], {}, "dog", {"dog": "puppy"}, ["dog", ""], ["dog", None], {"dog": (" ",)}, {"dog": (3,)}],
)
def test_a_vocabulary_that_is_none_is_refused(words, monkeypatch):
    # its checks refuse some of these already
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="vocabulary"):
        chair(["A dog."], [set()], words)


def test_captions_without_spaces_are_refused_and_segmented_ones_read():
    with pytest.raises(InputError, match="no spaces; put spaces"):
        chair(["\u4e00\u53ea\u732b\u5728\u96ea\u5730\u91cc"], [set()], ["\u732b"])
    spaced = chair(["\u4e00 \u53ea \u732b \u5728 \u96ea\u5730 \u91cc"], [set()], ["\u732b"])
    assert spaced.loc["CHAIR_i", "n"] == 1


def test_accents_are_the_same_however_they_were_typed():
    assert chair(["A cafe\u0301."], [set()], ["caf\u00e9"]).loc["CHAIR_i", "n"] == 1
    assert chair(["A caf\u00e9."], [set()], ["cafe\u0301"]).loc["CHAIR_i", "n"] == 1
