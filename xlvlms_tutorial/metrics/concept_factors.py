r"""How well concepts track factors whose values are known.

Information and purity per concept, each against permuted factors. Mutual information is in nats. A
concept's code is made discrete by one fixed rule: zero is a bin of its own, and the codes that are
not zero fall into up to three bins of equal frequency, equal codes always into the same one.
Permuting the rows of a factor keeps both margins and breaks the link, which is the null that each
number is compared with: information from finite samples is never 0 by itself.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.sparse import csr_array
from scipy.special import xlogy
from scipy.stats import false_discovery_control, rankdata
from sklearn.metrics import adjusted_mutual_info_score

from xlvlms_tutorial.errors import InputError, unequal_lengths
from xlvlms_tutorial.metrics.intervals import Estimate, percentile_interval, resampled_shares
from xlvlms_tutorial.metrics.plain import plain, require_estimate
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.text import whole_words
from xlvlms_tutorial.validation import require

N_BINS = 3  # for the codes that are not zero
_BLOCK = 2**22  # numbers of one array at a time, to bound memory
_NULLS = 8  # permuted factors that the interval of an agreement averages over


class _Factor(NamedTuple):
    """A factor: its name, and which of its values rows have.

    The mask (n,) of rows that have a value, the number of the value of each of these (m,), and the
    values.
    """

    name: object
    rows: np.ndarray
    numbers: np.ndarray
    values: np.ndarray


class _Counts(NamedTuple):
    """Rows by bin and value (4, k, p, V), and the share of each value at the top (k, p, V).

    Per concept, for p orders of the factor.
    """

    joint: np.ndarray
    top: np.ndarray


def factor_information(
    codes: ArrayLike,
    truth: pd.DataFrame | Mapping,
    n_permutations: int = 1000,
    top: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Measure how much each concept says about each known factor.

    Use it to see which concepts track which facts of the pictures, and whether more than by chance.
    Rows without a value (None, NaN) are left out for that factor, and factors with a single value
    altogether. A concept that is zero everywhere has no value and NaN purities.

    Parameters
    ----------
    codes : array-like (n, k)
        How active each concept is in each sample.
    truth : pandas.DataFrame or mapping
        The value of each factor in each sample: one column (n,) a factor.
    n_permutations : int, default 1000
        How often a factor's rows are permuted for the null, 100 or more.
    top : int, optional
        How many of the most active rows purity looks at; by default 10, or n // k where that is
        less. Rows of zero code never count, and rows that tie for the last places share them.
    seed : int, default 0
        Of the permutations.

    Returns
    -------
    pandas.DataFrame
        One row for each concept and factor. Columns: concept, factor; information
        :math:`I = \sum p(b, v) \log \frac{p(b, v)}{p(b) p(v)}` of the binned code and the factor,
        in nats; null, its mean over permutations of the factor's rows; excess, information - null;
        share, the excess relative to the factor's entropy; p, one-sided, (1 + hits) / (1 + tried);
        p_adjusted, Benjamini and Hochberg's over all rows of the table; value, the factor's value
        most over-represented among the ``top`` rows with the largest \|code\|; purity, its share
        there; base_rate, its share among all rows; null_purity and p_purity, the same choice under
        permutation; n, the rows with a value; n_values.

    Raises
    ------
    InputError
        If there are no codes, or one is NaN or infinite. If codes and factors differ in length. If
        no factor has two values, or fewer than 100 permutations are asked for. If ``top`` is below
        1, or the values of a factor hardly repeat, as those of a caption or a measurement.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import factor_information
    >>> codes = [[1.0, 0.0], [0.0, 1.0]] * 10
    >>> table = factor_information(codes, {"colour": ["red", "blue"] * 10}, n_permutations=100)
    >>> table["value"].tolist(), table["purity"].round(2).tolist()
    (['red', 'blue'], [1.0, 1.0])
    """
    activations = _codes(codes)
    n, k = activations.shape
    require_estimate(n_permutations >= 100, "n_permutations", n_permutations, "100 or more")
    if top is None:
        top = min(10, max(1, n // k))
    require(top >= 1, f"top={top}", "give 1 or more of the most activating rows, or None")
    tables = []
    for factor in _factors(truth, n):
        tables.append(_tracked(activations, factor, n_permutations, top, seed))
    table = pd.concat(tables, ignore_index=True)
    table.insert(table.columns.get_loc("p") + 1, "p_adjusted", false_discovery_control(table["p"]))
    return table.sort_values("concept", kind="stable", ignore_index=True)


def adjusted_mutual_information(
    codes: ArrayLike, factor: ArrayLike, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    r"""Estimate how well an assignment of samples to concepts agrees with a factor.

    The measure is adjusted mutual information: 0 at chance, 1 where each gives the other. Use it
    for a whole dictionary and one factor, where :func:`factor_information` looks at each concept.
    With entropies H, and E the mean of the information I over all permutations of the factor (Vinh
    et al., JMLR 2010), it is :math:`\frac{I - E}{(H_{concept} + H_{factor}) / 2 - E}`. The interval
    resamples rows. Rows drawn twice raise any mutual information, so each resample takes E from
    permutations made before it was drawn, which are raised alike.

    Parameters
    ----------
    codes : array-like (n, k) or (n,)
        How active each concept is in each sample, where each row belongs to its largest \|code\|
        (rows of zeros to none, which counts as a concept); or the label of each sample.
    factor : array-like (n,)
        The factor's value in each sample; rows without a value are left out.
    level : float, default 0.95
        The confidence level, between 0 and 1.
    n_resamples : int, default 2000
        How often rows are resampled, 100 or more.
    seed : int, default 0
        Of the resamples and permutations.

    Returns
    -------
    Estimate
        The agreement, its interval, and the number of rows with a value.

    Raises
    ------
    InputError
        If there are no codes, or one is NaN or infinite. If codes and factor differ in length. If
        the factor has one value only. If the values of the factor hardly repeat.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import adjusted_mutual_information
    >>> print(adjusted_mutual_information([0, 1] * 20, ["red", "blue"] * 20, n_resamples=100))
    1.00 [1.00, 1.00]
    """
    labels = np.asarray(codes)
    if labels.ndim != 1:
        labels = _assigned(_codes(labels))
    (repeated,) = _factors({"factor": factor}, len(labels))
    labels, _ = pd.factorize(labels[repeated.rows], use_na_sentinel=False)
    value = float(adjusted_mutual_info_score(repeated.numbers, labels))
    resamples = []
    for number, size in enumerate(_blocks(len(labels), n_resamples)):
        resamples.append(_resampled(labels, repeated.numbers, size, seed + number))
    return percentile_interval(value, np.concatenate(resamples), len(labels), level)


def varying_factors(truth: pd.DataFrame | Mapping) -> pd.DataFrame:
    """Select the factors that can be asked about.

    Use it before :func:`factor_information` and :func:`adjusted_mutual_information`.

    Those have two values or more, which repeat. What annotators say of photographs has gaps: a
    factor may be missing, the same everywhere, or different in every row.

    Parameters
    ----------
    truth : pandas.DataFrame or mapping
        The value of each factor in each sample: one column (n,) a factor.

    Returns
    -------
    pandas.DataFrame
        The columns of those factors.

    Raises
    ------
    InputError
        If there is none; the message says how many values each factor has.

    Examples
    --------
    >>> from xlvlms_tutorial.metrics import varying_factors
    >>> truth = {"colour": ["red", "blue"] * 2, "count": [1] * 4, "caption": list("abcd")}
    >>> varying_factors(truth).columns.tolist()
    ['colour']
    """
    table = pd.DataFrame(dict(truth.items()))
    selected, counts = [], []
    for name, column in table.items():
        n_values, n_rows = column.nunique(), int(column.count())
        counts.append(f"{name}: {n_values} in {n_rows} rows")
        if 1 < n_values <= _max_values(n_rows):
            selected.append(name)
    require_estimate(
        selected,
        "numbers of values",
        ", ".join(counts) or "no factors",
        "a factor with at least 2 different values that repeat; give more samples",
    )
    return table[selected]


def frequent_words(
    samples: Iterable[Sample], words: Sequence[str], min_count: int = 8
) -> list[str]:
    """List words that occur in the first captions of enough samples.

    Use it to choose words whose concepts can be studied in a dataset. Requested words that are too
    rare are replaced by the most frequent subjects and items of the samples. Words and phrases
    count whole, in any case.

    Parameters
    ----------
    samples : iterable of Sample
        The samples; those without captions are left out.
    words : sequence of str
        The requested words, which also say how many words are returned.
    min_count : int, default 8
        In how many first captions a word must occur.

    Returns
    -------
    list of str
        As many words as requested, or fewer where no more occur often enough.

    Raises
    ------
    InputError
        If no word occurs often enough; the message has the words that captions have most often.

    Examples
    --------
    >>> from xlvlms_tutorial.data import Sample
    >>> from xlvlms_tutorial.metrics import frequent_words
    >>> scene = Sample("scene", None, ("A woman holds a key.",), truth={"item": "key"})
    >>> frequent_words([scene] * 8, ["woman", "dog"])
    ['woman', 'key']
    """
    captions = []
    objects = Counter()
    for sample in samples:
        if not sample.captions:
            continue
        captions.append(sample.captions[0])
        for factor in ("subject", "item"):
            noun = sample.truth.get(factor)
            if isinstance(noun, str):
                objects[noun] += 1
    nouns = [noun for noun, _ in objects.most_common()]
    result = []
    for word in dict.fromkeys([*words, *nouns]):
        pattern = whole_words([word])
        n_captions = sum(pattern.search(caption) is not None for caption in captions)
        if n_captions >= min_count and len(result) < len(words):
            result.append(word)
    if result:
        return result
    counts = Counter()
    for caption in captions:
        counts.update(set(re.findall(r"\w+", caption.lower())))
    frequent = ", ".join(f"{word!r} ({count})" for word, count in counts.most_common(10))
    raise InputError(
        f"fewer than {min_count} of {len(captions)} samples say {', '.join(map(repr, words))}",
        f"they say {frequent or 'nothing'}",
    )


def _max_values(rows: int) -> float:
    """Return how many values a factor may have for its values to repeat."""
    return max(2, rows / 2)


def _codes(codes: ArrayLike) -> Float[np.ndarray, "n k"]:
    """Return codes as a matrix of finite numbers, or refuse them."""
    try:
        values = np.asarray(plain(codes), dtype=float)
    except (TypeError, ValueError) as cause:
        raise InputError(
            f"codes are not numbers ({cause})", "give one row of codes for each sample"
        ) from cause
    require(
        values.ndim == 2 and values.size > 0,
        f"codes have the shape {values.shape}",
        "give (n, k): one row for each sample, one column for each concept",
    )
    n_bad = int((~np.isfinite(values)).sum())
    require(n_bad == 0, f"{n_bad} of {values.size} codes are NaN or infinite", "give finite codes")
    return values


def _factors(truth: pd.DataFrame | Mapping, n: int) -> list[_Factor]:
    columns = dict(truth.items())
    for name, values in columns.items():
        if len(values) != n:
            raise unequal_lengths(codes=n, **{str(name): len(values)})
    factors, counts = [], []
    for name, values in columns.items():
        factor = _factor(name, pd.Series(list(values), dtype=object))
        counts.append(f"{name}: {len(factor.values)}")
        if len(factor.values) > 1:
            factors.append(factor)
    require_estimate(
        factors,
        "numbers of values",
        ", ".join(counts) or "no factors",
        "a factor with at least 2 different values",
    )
    return factors


def _factor(name: object, column: pd.Series) -> _Factor:
    """Number the values of a factor, without the rows that have none."""
    try:
        numbers, values = pd.factorize(column)
    except TypeError as cause:
        raise InputError(
            f"the values of factor {name!r} cannot be told apart ({cause})", "give words or numbers"
        ) from cause
    rows = numbers >= 0
    n_rows = int(rows.sum())
    require(
        len(values) <= _max_values(n_rows),
        f"factor {name!r} has {len(values)} values in {n_rows} rows",
        "give factors whose values repeat, or put a measurement into bins first",
    )
    return _Factor(name, rows, numbers[rows], np.asarray(values, dtype=object))


def _tracked(
    codes: Float[np.ndarray, "n k"], factor: _Factor, n_permutations: int, top: int, seed: int
) -> pd.DataFrame:
    """Measure how well each concept tracks a factor, against permutations of it."""
    codes = codes[factor.rows]
    n, k = codes.shape
    base = np.bincount(factor.numbers) / n
    n_values = len(base)
    count = _counter(codes, min(top, n), n_values)
    data = factor.numbers[None]  # the first order is that of the data
    information, best, purity, above = _measured(count(data), base, n)
    # orders that tie with that of the data differ from it by rounding
    least_information = information - 1e-9
    least_above = above - 1e-5
    sums = np.zeros((2, k))
    hits = np.zeros((2, k))
    size = n_values * max(n, 4 * k)
    for orders in _orders(factor.numbers, n_permutations, size, seed):
        permuted, _, purities, permuted_above = _measured(count(orders), base, n)
        sums[0] += permuted.sum(axis=1)
        sums[1] += purities.sum(axis=1)
        hits[0] += (permuted >= least_information).sum(axis=1)
        hits[1] += (permuted_above >= least_above).sum(axis=1)
    null_information, null_purity = sums / n_permutations
    p_information, p_purity = (1 + hits) / (1 + n_permutations)
    information = information[:, 0]
    best = best[:, 0]
    excess = information - null_information
    table = pd.DataFrame({"concept": np.arange(k), "factor": factor.name})
    table["information"] = information
    table["null"] = null_information
    table["excess"] = excess
    table["share"] = excess / _entropy(n * base[None], (1,))
    table["p"] = p_information
    alive = codes.any(axis=0)
    table["value"] = np.where(alive, factor.values[best], None)
    table["purity"] = np.where(alive, purity[:, 0], np.nan)
    table["base_rate"] = np.where(alive, base[best], np.nan)
    table["null_purity"] = np.where(alive, null_purity, np.nan)
    table["p_purity"] = p_purity
    table["n"] = n
    table["n_values"] = n_values
    return table


def _counter(
    codes: Float[np.ndarray, "m k"], top: int, n_values: int
) -> Callable[[Int[np.ndarray, "p m"]], _Counts]:
    """Make a function from orders of a factor (p, m) to counts.

    One product of the bins' and top rows' indicators with the values'.
    """
    k = codes.shape[1]
    bins = _bins(codes)
    weights = _top_weights(codes, top)
    in_bins = [bins == b for b in range(1, N_BINS + 1)]
    indicators = np.concatenate([*in_bins, weights], axis=1).astype(np.float32)
    n_top = np.maximum(weights.sum(axis=0), 1e-9)[:, None, None]

    def count(orders: Int[np.ndarray, "p m"]) -> _Counts:
        one_hot = (orders.T[:, :, None] == np.arange(n_values)).astype(np.float32)
        product = indicators.T @ one_hot.reshape(len(one_hot), -1)
        product = product.reshape(N_BINS + 1, k, len(orders), n_values)
        nonzero = product[:N_BINS]
        all_rows = np.bincount(orders[0], minlength=n_values)
        zero = all_rows - nonzero.sum(axis=0, keepdims=True)
        joint = np.concatenate([zero, nonzero])
        return _Counts(joint, product[N_BINS] / n_top)

    return count


def _bins(codes: Float[np.ndarray, "m k"]) -> Int[np.ndarray, "m k"]:
    """Give 0 for a zero, 1 to 3 for the thirds of a column's other codes, by their mean ranks."""
    nonzero = codes != 0
    n_nonzero = np.maximum(nonzero.sum(axis=0), 1)
    zeros_last = np.where(nonzero, codes, np.inf)
    ranks = rankdata(zeros_last, axis=0) - 0.5
    thirds = (N_BINS * ranks / n_nonzero).astype(int)
    return np.where(nonzero, 1 + thirds.clip(max=N_BINS - 1), 0)


def _top_weights(codes: Float[np.ndarray, "m k"], top: int) -> Float[np.ndarray, "m k"]:
    """Mark which rows are among the ``top`` largest of a column, as numbers from 0 to 1.

    1 for those among them, a fraction for those that tie for the last places, 0 elsewhere.
    """
    sizes = np.abs(codes)
    last = np.partition(sizes, -top, axis=0)[-top]
    above = sizes > last
    tied = (sizes == last) & (sizes > 0)
    n_shared = top - above.sum(axis=0)  # rows that those which tie share
    return above + tied * n_shared / np.maximum(tied.sum(axis=0), 1)


def _entropy(counts: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Compute the entropy over some axes of integer counts, from a table of c log c.

    The logarithms would cost more than the counting.
    """
    integers = np.rint(counts).astype(np.int32)
    total = integers.sum(axis=axes, keepdims=True).ravel()[0]
    sizes = np.arange(total + 1.0)
    table = xlogy(sizes, sizes)
    return np.log(total) - table[integers].sum(axis=axes) / total


def _measured(counts: _Counts, base: Float[np.ndarray, "v"], n: int) -> tuple[np.ndarray, ...]:
    """Return information, and the value most over-represented at the top, with its purity.

    Then by how much its share there, the purity, exceeds its base rate; (k, p).
    """
    code_entropy = _entropy(counts.joint.sum(axis=3), (0,))
    factor_entropy = _entropy(n * base[None], (1,))
    information = code_entropy + factor_entropy - _entropy(counts.joint, (0, 3))
    best = (counts.top - base).argmax(axis=2)
    purity = np.take_along_axis(counts.top, best[..., None], axis=2)[..., 0]
    above = purity - base[best]
    return information, best, purity, above


def _orders(
    numbers: np.ndarray, n_permutations: int, size: int, seed: int
) -> Iterator[Int[np.ndarray, "p m"]]:
    """Yield permutations of a factor, so many at a time that memory is bounded."""
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // size)
    for start in range(0, n_permutations, step):
        n_orders = min(step, n_permutations - start)
        copies = np.tile(numbers, (n_orders, 1))
        yield rng.permuted(copies, axis=1)


def _assigned(codes: Float[np.ndarray, "n k"]) -> Int[np.ndarray, "n"]:
    """Return the concept with the largest code of each sample, -1 where all are zero."""
    largest = np.abs(codes).argmax(axis=1)
    return np.where(codes.any(axis=1), largest, -1)


def _blocks(n: int, n_resamples: int) -> list[int]:
    """Divide resamples into blocks to draw at once, at least 100 wherever there are as many."""
    count = max(1, min(n_resamples // 100, n_resamples * n // (2 * _BLOCK)))
    return [len(part) for part in np.array_split(np.arange(n_resamples), count)]


def _resampled(
    labels: Int[np.ndarray, "n"], values: Int[np.ndarray, "n"], n_resamples: int, seed: int
) -> Float[np.ndarray, "r"]:
    """Compute the agreement on resamples.

    Tables of shares are products of the sparse indicator of each row's
    cell with the resamples' shares.
    """
    shares = resampled_shares(len(labels), n_resamples, seed).T
    n_labels = int(labels.max()) + 1
    n_values = int(values.max()) + 1
    rng = np.random.default_rng(seed)
    permuted = rng.permuted(np.tile(values, (_NULLS, 1)), axis=1)
    tables = []
    for order in [values, *permuted]:
        cells = _indicator(labels * n_values + order, n_labels * n_values)
        tables.append((cells @ shares).reshape(n_labels, n_values, -1))
    concept_entropy = _margin_entropy(tables[0], 1)
    factor_entropy = _margin_entropy(tables[0], 0)
    information = []
    for table in tables:
        negative_joint_entropy = xlogy(table, table).sum(axis=(0, 1))
        information.append(concept_entropy + _margin_entropy(table, 0) + negative_joint_entropy)
    observed, *nulls = information
    expected = np.mean(nulls, axis=0)
    upper = (concept_entropy + factor_entropy) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (observed - expected) / (upper - expected)


def _margin_entropy(table: np.ndarray, axis: int) -> np.ndarray:
    """Compute the entropy of what is left when an axis is summed over, for each resample."""
    shares = table.sum(axis=axis)
    return -xlogy(shares, shares).sum(axis=0)


def _indicator(cells: Int[np.ndarray, "n"], n_cells: int) -> csr_array:
    n = len(cells)
    places = (cells, np.arange(n))
    return csr_array((np.ones(n), places), shape=(n_cells, n))
