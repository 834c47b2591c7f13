"""The table of architectures says what transformers and the contract tests say."""

import transformers as hf

from tests.zoo import MODELS, build
from xlvlms_tutorial.loading import loading
from xlvlms_tutorial.models.architectures import ARCHITECTURES, architectures


def test_every_architecture_of_the_table_has_a_model_class_and_a_tiny_model_in_the_contract_suite():
    for kind in ARCHITECTURES:
        assert loading._auto_class("any", hf.AutoConfig.for_model(kind)).__name__.startswith(
            "AutoModelFor"
        )
    assert {build(name)[0].config.model_type for name in MODELS} == set(ARCHITECTURES)


def test_the_table_says_which_have_no_image_positions():
    table = architectures().set_index("model_type")
    assert list(table.columns) == ["name", "takes", "note"] and len(table) == len(ARCHITECTURES)
    assert set(table.index[table["note"].str.contains("no image positions")]) == {
        "mllama",
        "idefics",
    }
    assert table.loc["qwen2_audio", "takes"] == "audio"
    assert "video" in table.loc["qwen2_vl", "takes"]
