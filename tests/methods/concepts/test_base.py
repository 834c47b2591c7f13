"""What all dictionaries promise.

scikit-learn's conventions, our errors, formats, tensors, and files that are read back as they were.
"""

import json
from functools import partial

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from xlvlms_tutorial.errors import FileError, InputError, LoadError
from xlvlms_tutorial.methods.concepts import DICTIONARIES, PCA, KMeans, SemiNMF, Simple
from xlvlms_tutorial.methods.concepts.base import load_dictionary

OURS = {"semi-nmf": partial(SemiNMF, penalty=0.5), "pca": PCA, "k-means": KMeans, "simple": Simple}


def activations(n=40, d=12, seed=0):
    random = np.random.default_rng(seed)
    return (
        random.gamma(1.0, 2.0, (n, 5)) @ random.standard_normal((5, d))
        + random.standard_normal((n, d))
    ).astype(np.float32)


@pytest.fixture(params=OURS)
def dictionary(request):
    return OURS[request.param](n_components=3)


@parametrize_with_checks(
    [
        SemiNMF(n_components=2, penalty=0.1),
        PCA(n_components=2),
        KMeans(n_components=2),
        Simple(n_components=2),
    ]
)
def test_scikit_learn_accepts_the_estimator(estimator, check, monkeypatch):
    # its checks hand over what annotations rule out
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    check(estimator)


def test_shapes_and_formats_follow_the_activations(dictionary):
    for dtype in (np.float32, np.float64):
        A = activations().astype(dtype)
        codes = dictionary.fit(A).transform(A)
        assert (codes.shape, dictionary.components_.shape) == ((40, 3), (3, 12))
        rebuilt = dictionary.reconstruct(A)
        assert {x.dtype for x in (codes, rebuilt, dictionary.components_)} == {np.dtype(dtype)}
        np.testing.assert_array_equal(rebuilt, dictionary.inverse_transform(codes))
        np.testing.assert_array_equal(dictionary.fit_transform(A), codes)
    assert list(dictionary.get_feature_names_out())[0].endswith("0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_as_good_as_arrays_and_halves_are_widened(dictionary, dtype):
    A = torch.from_numpy(activations()).to(dtype).requires_grad_()
    codes = dictionary.fit(A).transform(A)
    assert codes.dtype == np.float32
    np.testing.assert_array_equal(
        codes, clone(dictionary).fit_transform(A.detach().float().numpy())
    )
    if dtype == torch.float16:
        np.testing.assert_array_equal(codes, dictionary.transform(A.detach().numpy()))


def test_the_activations_are_not_changed_and_may_be_read_only(dictionary):
    A = activations()
    original = A.copy()
    A.flags.writeable = False
    dictionary.fit(A).reconstruct(A)
    np.testing.assert_array_equal(A, original)


def test_fits_in_a_pipeline_and_on_a_table(dictionary):
    table = pd.DataFrame(activations(), columns=[f"c{k}" for k in range(12)])
    assert make_pipeline(StandardScaler(), dictionary).fit_transform(table).shape == (40, 3)
    assert list(dictionary.fit(table).feature_names_in_) == list(table.columns)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_and_refused(dictionary, bad):
    A = activations()
    dictionary.fit(A)
    A[3, 4] = bad
    for use in (dictionary.fit, dictionary.transform, dictionary.reconstruct):
        with pytest.raises(InputError, match="1 of 480 numbers are NaN or infinite"):
            use(A)
    with pytest.raises(InputError, match="1 of 9 numbers"):
        dictionary.inverse_transform([[1, 2, bad], [1, 2, 3], [1, 2, 3]])


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None, "3"])
def test_a_number_of_concepts_that_makes_no_sense_is_refused(dictionary, k):
    with pytest.raises(InputError, match="n_components is"):
        dictionary.set_params(n_components=k).fit(activations())


def test_fewer_samples_than_concepts_are_refused(dictionary):
    with pytest.raises(InputError, match="2 samples for 3 concepts"):
        dictionary.fit(activations(n=2))
    dictionary.fit(activations(n=3))
    assert len(dictionary.components_) == 3


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float64, 0.0), (torch.float32, 3.0), (torch.float32, 0.0), (torch.bfloat16, -500.0)],
)
@pytest.mark.parametrize("name", [*OURS, "sae"])
def test_dimensions_that_do_not_vary_are_no_harm(name, dtype, value):
    dictionary = (OURS | {"sae": partial(DICTIONARIES["sae"], max_iter=20)})[name](n_components=3)
    A = torch.from_numpy(activations()).to(dtype)
    A[:, [2, 7]] = value
    rebuilt = dictionary.fit(A).reconstruct(A)
    assert dictionary.components_.shape == (3, 12)
    assert np.isfinite(rebuilt).all()
    if name in ("pca", "k-means", "simple"):  # the others shrink
        np.testing.assert_allclose(rebuilt[:, [2, 7]], float(A[0, 2]), rtol=1e-5, atol=1e-5)


def test_the_massive_dimension_of_bfloat16_is_no_harm():
    A = torch.from_numpy(activations(200, 64))
    A[:, 9] += 5000  # where bfloat16 has steps of 32
    A = A.bfloat16()
    assert (A[:, 9] == A[0, 9]).all()
    for kind in OURS.values():
        assert kind(n_components=3).fit(A).transform(A).shape == (200, 3)


@pytest.mark.parametrize("n", [3, 40])
def test_samples_that_are_all_the_same_are_refused(dictionary, n):
    with pytest.raises(InputError, match=f"all {n} samples are the same; give samples that differ"):
        dictionary.fit(np.repeat(activations()[:1], n, axis=0))


def test_what_is_no_matrix_is_refused(dictionary):
    for wrong in (activations()[0], activations()[None], np.empty((0, 12)), [["a", "b"]] * 4):
        with pytest.raises(InputError, match="cannot be used"):
            dictionary.fit(wrong)


def test_another_width_is_refused(dictionary):
    dictionary.fit(activations())
    with pytest.raises(
        InputError, match="widths of the activations differ: 12 and 11; X has 11 features"
    ):
        dictionary.transform(activations()[:, :11])
    with pytest.raises(InputError, match=r"shapes of the codes differ: \('n', 3\) and \(40, 2\)"):
        dictionary.inverse_transform(np.ones((40, 2)))
    with pytest.raises(InputError, match="shapes of the codes"):
        dictionary.inverse_transform(np.ones(3))


def test_nothing_comes_from_a_dictionary_that_was_not_fitted(dictionary, tmp_path):
    for use in (
        dictionary.transform,
        dictionary.inverse_transform,
        dictionary.reconstruct,
        partial(dictionary.save, tmp_path / "d", {}),
    ):
        with pytest.raises(NotFittedError):
            use(*[activations()] * (not isinstance(use, partial)))


def test_a_device_that_is_not_there_is_refused(dictionary):
    for device, error in (("tpu9", LoadError), ("balanced", InputError)):
        with pytest.raises(error, match=device):
            dictionary.set_params(device=device).fit(activations())
    assert dictionary.set_params(device="auto").fit_transform(activations()).shape == (40, 3)


def test_a_file_gives_back_what_was_saved(dictionary, tmp_path):
    table = pd.DataFrame(activations(), columns=[f"c{k}" for k in range(12)])
    dictionary.fit(table)
    path = dictionary.save(
        tmp_path / "new" / "d.safetensors", {"model": "pocket-llava", "layer": 30}
    )
    loaded = load_dictionary(path)
    assert type(loaded) is type(dictionary)
    assert loaded.get_params() == dictionary.get_params()
    assert loaded.provenance_ == {"model": "pocket-llava", "layer": 30}
    assert vars(loaded).keys() == vars(dictionary).keys() | {"provenance_"}
    np.testing.assert_array_equal(loaded.components_, dictionary.components_)
    np.testing.assert_array_equal(loaded.reconstruct(table), dictionary.reconstruct(table))
    again = load_dictionary(loaded.save(tmp_path / "again", loaded.provenance_ | {"layer": 29}))
    assert again.provenance_["layer"] == 29


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "d"
    with pytest.raises(LoadError, match="cannot be read"):
        load_dictionary(path)
    path.write_bytes(b"damaged")
    with pytest.raises(LoadError, match="cannot be read"):
        load_dictionary(path)
    save_file({"components_": np.ones((2, 3))}, path)
    with pytest.raises(LoadError, match="no dictionary of format"):
        load_dictionary(path)
    metadata = {"class": "Forest", "parameters": {}, "fitted": {}, "provenance": {}}
    message = {"format": "xlvlms dictionary 1"} | {
        name: json.dumps(value) for name, value in metadata.items()
    }
    save_file({"components_": np.ones((2, 3))}, path, message)
    with pytest.raises(LoadError, match="class 'Forest'; known: .*SemiNMF"):
        load_dictionary(path)
    for part, value in (("parameters", "{"), ("parameters", '{"colour": 1}'), ("class", None)):
        broken = {
            name: text
            for name, text in (message | {"class": '"PCA"', part: value}).items()
            if text is not None
        }
        save_file({"components_": np.ones((2, 3))}, path, broken)
        with pytest.raises(LoadError, match="damaged"):
            load_dictionary(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays, metadata: arrays.pop("components_"),
        lambda arrays, metadata: arrays.update(components_=np.ones((2, 5))),
        lambda arrays, metadata: arrays.update(components_=np.ones(12)),
        lambda arrays, metadata: arrays["components_"].fill(np.nan),
        lambda arrays, metadata: arrays["mean_"].__setitem__(3, np.inf),
        lambda arrays, metadata: arrays.update(mean_=np.ones(5)),
        lambda arrays, metadata: arrays.pop("mean_"),
        lambda arrays, metadata: arrays.update(_checked=np.ones(2)),
        lambda arrays, metadata: metadata["fitted"].pop("n_features_in_"),
        lambda arrays, metadata: metadata["fitted"].update(n_features_in_=11),
        lambda arrays, metadata: metadata["fitted"].update(transform="x"),
        lambda arrays, metadata: metadata["fitted"].update(n_components=2),
        lambda arrays, metadata: metadata["fitted"].update(components_=[[1, 2]]),
        lambda arrays, metadata: metadata.update(fitted=[]),
        lambda arrays, metadata: metadata.update(fitted=None),
        lambda arrays, metadata: metadata.update(parameters=[1]),
        lambda arrays, metadata: metadata.update(parameters={"n_components": "3"}),
        lambda arrays, metadata: metadata.update(provenance=3),
        lambda arrays, metadata: metadata.update({"class": {}}),
    ],
)
def test_a_file_whose_parts_do_not_go_together_is_refused(damage, tmp_path):
    path = PCA(3).fit(activations()).save(tmp_path / "d", {"model": "pocket-llava"})
    with safe_open(path, "np") as file:
        # the file is no mapping
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {
            name: json.loads(text) for name, text in file.metadata().items() if name != "format"
        }
    damage(arrays, metadata)
    save_file(
        arrays,
        path,
        {"format": "xlvlms dictionary 1"}
        | {name: json.dumps(value) for name, value in metadata.items()},
    )
    with pytest.raises(LoadError, match="damaged|class"):
        load_dictionary(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "{", ""])
def test_descriptions_of_any_depth_or_kind_are_refused(text, tmp_path):
    path = PCA(3).fit(activations()).save(tmp_path / "d", {})
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for part in ("class", "parameters", "fitted", "provenance"):
        save_file(arrays, path, metadata | {part: text})
        with pytest.raises(LoadError, match="damaged|class"):
            load_dictionary(path)


def test_a_file_from_a_machine_with_another_device_is_read(tmp_path):
    model = PCA(3).fit(activations())
    path = model.set_params(device="cuda:7").save(tmp_path / "d", {})
    np.testing.assert_array_equal(load_dictionary(path).components_, model.components_)


def test_a_file_cut_short_is_refused(tmp_path):
    path = PCA(3).fit(activations()).save(tmp_path / "d", {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LoadError, match="cannot be read"):
        load_dictionary(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="file"):
        PCA(3).fit(activations()).save(tmp_path / "file" / "d", {})


def test_the_table_of_names_makes_dictionaries():
    A = activations()
    for name, kind in DICTIONARIES.items():
        assert kind(n_components=3).get_params()["n_components"] == 3, name
        if name != "sae":
            assert kind(3).fit_transform(A).shape == (40, 3)
