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

from xlvlms_tutorial.errors import ActivationsError, EstimateError, LengthError, SelectionError
from xlvlms_tutorial.metrics.intervals import Estimate, interval, resampled_shares
from xlvlms_tutorial.metrics.plain import plain
from xlvlms_tutorial.samples import Sample
from xlvlms_tutorial.text import whole_words

N_BINS = 3  # for the codes that are not zero
_BLOCK = 2**22  # numbers of one array at a time, to bound memory
_NULLS = 8  # permuted factors that the interval of an agreement averages over


class _Factor(NamedTuple):
    """A factor: its name, and which of its values rows have.

    The rows (n,) that have a value, the number of the value of each of these (m,), and the values.
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


def track(
    codes: ArrayLike,
    truth: pd.DataFrame | Mapping,
    n_permutations: int = 1000,
    top: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    r"""How much each concept says about each known factor.

    One row for each concept (column of ``codes`` (n, k)) and factor of ``truth``. Columns: concept,
    factor; information :math:`I = \sum p(b, v) \log \frac{p(b, v)}{p(b) p(v)}` of the binned code
    and the factor, null (its mean over permutations of the factor's rows), excess = information -
    null, share (the excess relative to the factor's entropy), p (one-sided, (1 + hits) / (1 +
    tried)), p_adjusted (Benjamini and Hochberg's, over all rows of the table); value (the factor's
    value most over-represented among the ``top`` rows with the largest \|code\|), purity (its share
    there), base_rate (its share among all rows), null_purity and p_purity (the same choice under
    permutation); n (rows with a value) and n_values.

    ``top`` is by default 10, or n // k where that is less; rows of zero code never count, and
    rows that tie for the last places share them. Rows without a value (None, NaN) are left out
    for that factor, and factors with a single value altogether. A concept that is zero everywhere
    has no value and NaN purities.

    Raises
    ------
    ActivationsError
        If there are no codes, or one is NaN or infinite.
    LengthError
        If codes and factors differ in length.
    EstimateError
        If no factor has two values, or fewer than 100 permutations are asked for.
    SelectionError
        If ``top`` is below 1, or the values of a factor hardly repeat, as those
        of a caption or a measurement.
    """
    activations = _codes(codes)
    n, k = activations.shape
    if n_permutations < 100:
        raise EstimateError("n_permutations", n_permutations, "100 or more")
    if top is not None and top < 1:
        raise SelectionError(f"top={top}", "give 1 or more of the most activating rows, or None")
    wanted = min(10, max(1, n // k)) if top is None else top
    found = pd.concat(
        [
            _tracked(activations, factor, n_permutations, wanted, seed)
            for factor in _factors(truth, n)
        ],
        ignore_index=True,
    )
    found.insert(found.columns.get_loc("p") + 1, "p_adjusted", false_discovery_control(found["p"]))
    return found.sort_values("concept", kind="stable", ignore_index=True)


def agreement(
    codes: ArrayLike, factor: ArrayLike, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    r"""Adjusted mutual information of an assignment of rows to concepts and a factor (n,).

    0 at chance, 1 where each gives the other. ``codes`` are (n, k), and each row belongs to its
    largest \|code\| (rows of zeros to none, which counts as a concept), or are labels (n,). With
    entropies H, and E the mean of I over all permutations of the factor (Vinh et al., JMLR 2010),
    :math:`\frac{I - E}{(H_{concept} + H_{factor}) / 2 - E}`. The interval resamples rows. Rows
    drawn twice raise any mutual information, so each resample takes E from permutations made before
    it was drawn, which are raised alike. Rows without a value are left out.

    Raises
    ------
    ActivationsError, LengthError, SelectionError
        As :func:`track`.
    EstimateError
        If the factor has one value only.
    """
    given = np.asarray(codes)
    labels = given if given.ndim == 1 else _assigned(_codes(given))
    (known,) = _factors({"factor": factor}, len(labels))
    labels = pd.factorize(labels[known.rows], use_na_sentinel=False)[0]
    value = float(adjusted_mutual_info_score(known.numbers, labels))
    blocks = _blocks(len(labels), n_resamples)
    drawn = np.concatenate(
        [_resampled(labels, known.numbers, size, seed + i) for i, size in enumerate(blocks)]
    )
    return interval(value, drawn, len(labels), level)


def informative(truth: pd.DataFrame | Mapping) -> pd.DataFrame:
    """The factors that :func:`track` and :func:`agreement` can ask about.

    Those with two values or more, which repeat. What annotators say of photographs has gaps: a
    factor may be missing, the same everywhere, or different in every row.

    Raises
    ------
    EstimateError
        If there is none.
    """
    table = pd.DataFrame(dict(truth.items()))
    kept = [
        name
        for name, column in table.items()
        if 1 < column.nunique() <= _most_values(int(column.count()))
    ]
    if not kept:
        found = (
            ", ".join(
                f"{name}: {column.nunique()} in {column.count()} rows"
                for name, column in table.items()
            )
            or "no factors"
        )
        raise EstimateError(
            "numbers of values",
            found,
            "a factor with at least 2 different values that repeat; give more samples",
        )
    return table[kept]


def spoken(samples: Iterable[Sample], wanted: Sequence[str], least: int = 8) -> list[str]:
    """The words that the first captions of so many samples or more hold.

    Those wanted, and in place of the others what samples show most. There are as many as wanted, or
    fewer where no more are said so often. Words and phrases count whole, in any case.

    Raises
    ------
    SelectionError
        If no word is said so often, with the words that captions have most often.
    """
    known = [sample for sample in samples if sample.captions]
    shown = Counter(
        value
        for sample in known
        for value in map(sample.truth.get, ("subject", "item"))
        if isinstance(value, str)
    )
    told, found = [sample.captions[0] for sample in known], []
    for word in dict.fromkeys([*wanted, *(name for name, _ in shown.most_common())]):
        often = sum(map(bool, map(whole_words([word]).search, told))) >= least
        found += [word] if often and len(found) < len(wanted) else []
    if not found:
        heard = Counter(word for text in told for word in {*re.findall(r"\w+", text.lower())})
        most = (
            ", ".join(f"{word!r} ({count})" for word, count in heard.most_common(10)) or "nothing"
        )
        raise SelectionError(
            f"fewer than {least} of {len(known)} samples say {', '.join(map(repr, wanted))}",
            f"they say {most}",
        )
    return found


def _most_values(rows: int) -> float:
    """How many values a factor may have for its values to repeat."""
    return max(2, rows / 2)


def _codes(codes: ArrayLike) -> Float[np.ndarray, "n k"]:
    try:
        found = np.asarray(plain(codes), dtype=float)
    except (TypeError, ValueError) as cause:
        raise ActivationsError(
            f"codes are not numbers ({cause})", "give one row of codes for each sample"
        ) from cause
    if found.ndim != 2 or found.size == 0:
        raise ActivationsError(
            f"codes have the shape {found.shape}",
            "give (n, k): one row for each sample, one column for each concept",
        )
    if not np.isfinite(found).all():
        raise ActivationsError(
            f"{int((~np.isfinite(found)).sum())} of {found.size} codes are NaN or infinite",
            "give finite codes",
        )
    return found


def _factors(truth: pd.DataFrame | Mapping, n: int) -> list[_Factor]:
    columns = dict(truth.items())
    for name, values in columns.items():
        if len(values) != n:
            raise LengthError(codes=n, **{str(name): len(values)})
    named = [
        _factor(name, pd.Series(list(values), dtype=object)) for name, values in columns.items()
    ]
    kept = [factor for factor in named if len(factor.values) > 1]
    if not kept:
        told = ", ".join(f"{factor.name}: {len(factor.values)}" for factor in named) or "no factors"
        raise EstimateError("numbers of values", told, "a factor with at least 2 different values")
    return kept


def _factor(name: object, column: pd.Series) -> _Factor:
    try:
        numbers, values = pd.factorize(column)
    except TypeError as cause:
        raise SelectionError(
            f"the values of factor {name!r} cannot be told apart ({cause})", "give words or numbers"
        ) from cause
    rows = numbers >= 0
    if len(values) > _most_values(int(rows.sum())):
        advice = "give factors whose values repeat, or put a measurement into bins first"
        raise SelectionError(
            f"factor {name!r} has {len(values)} values in {rows.sum()} rows", advice
        )
    return _Factor(name, rows, numbers[rows], np.asarray(values, dtype=object))


def _tracked(
    codes: Float[np.ndarray, "n k"], factor: _Factor, n_permutations: int, top: int, seed: int
) -> pd.DataFrame:
    codes = codes[factor.rows]
    n, k = codes.shape
    base = np.bincount(factor.numbers) / n
    counted = _counter(codes, min(top, n), len(base))
    information, value, purity, above = _measured(counted(factor.numbers[None]), base, n)
    sums, hits = np.zeros((2, k)), np.zeros((2, k))
    for orders in _orders(factor.numbers, n_permutations, len(base) * max(n, 4 * k), seed):
        infos, _, purities, aboves = _measured(counted(orders), base, n)
        sums += infos.sum(axis=1), purities.sum(axis=1)
        # Orders that tie with the one found differ from it by rounding
        hits += (infos >= information - 1e-9).sum(axis=1), (aboves >= above - 1e-5).sum(axis=1)
    null, p = sums / n_permutations, (1 + hits) / (1 + n_permutations)
    alive = codes.any(axis=0)
    excess = information[:, 0] - null[0]
    return pd.DataFrame(
        {
            "concept": np.arange(k),
            "factor": factor.name,
            "information": information[:, 0],
            "null": null[0],
            "excess": excess,
            "share": excess / _entropy(n * base[None], (1,)),
            "p": p[0],
            "value": np.where(alive, factor.values[value[:, 0]], None),
            "purity": np.where(alive, purity[:, 0], np.nan),
            "base_rate": np.where(alive, base[value[:, 0]], np.nan),
            "null_purity": np.where(alive, null[1], np.nan),
            "p_purity": p[1],
            "n": n,
            "n_values": len(base),
        }
    )


def _counter(
    codes: Float[np.ndarray, "m k"], top: int, n_values: int
) -> Callable[[Int[np.ndarray, "p m"]], _Counts]:
    """A function from orders of a factor (p, m) to counts.

    One product of the bins' and top rows' indicators with the values'.
    """
    k, bins, weights = codes.shape[1], _bins(codes), _top_weights(codes, top)
    indicators = np.concatenate(
        [*(bins == b for b in range(1, N_BINS + 1)), weights], axis=1
    ).astype(np.float32)
    places = np.maximum(weights.sum(axis=0), 1e-9)[:, None, None]

    def counted(orders: Int[np.ndarray, "p m"]) -> _Counts:
        values = (orders.T[:, :, None] == np.arange(n_values)).astype(np.float32)
        product = (indicators.T @ values.reshape(len(values), -1)).reshape(
            N_BINS + 1, k, len(orders), n_values
        )
        nonzero = product[:N_BINS]
        zero = np.bincount(orders[0], minlength=n_values) - nonzero.sum(axis=0, keepdims=True)
        return _Counts(np.concatenate([zero, nonzero]), product[N_BINS] / places)

    return counted


def _bins(codes: Float[np.ndarray, "m k"]) -> Int[np.ndarray, "m k"]:
    """0 for a zero, 1 to 3 for the thirds of the other codes of a column, by their mean ranks."""
    nonzero = codes != 0
    ranks = rankdata(np.where(nonzero, codes, np.inf), axis=0) - 0.5
    return np.where(
        nonzero,
        1 + (N_BINS * ranks / np.maximum(nonzero.sum(axis=0), 1)).astype(int).clip(max=N_BINS - 1),
        0,
    )


def _top_weights(codes: Float[np.ndarray, "m k"], top: int) -> Float[np.ndarray, "m k"]:
    """Which rows are among the ``top`` largest of a column, as numbers from 0 to 1.

    1 for those among them, a fraction for those that tie for the last places, 0 elsewhere.
    """
    sizes = np.abs(codes)
    last = np.partition(sizes, -top, axis=0)[-top]
    above, tied = sizes > last, (sizes == last) & (sizes > 0)
    return above + tied * (top - above.sum(axis=0)) / np.maximum(tied.sum(axis=0), 1)


def _entropy(counts: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Entropy over some axes of whole counts, from a table of c log c.

    The logarithms would cost more than the counting.
    """
    whole = np.rint(counts).astype(np.int32)
    total = whole.sum(axis=axes, keepdims=True).ravel()[0]
    table = xlogy(np.arange(total + 1.0), np.arange(total + 1.0))
    return np.log(total) - table[whole].sum(axis=axes) / total


def _measured(counts: _Counts, base: Float[np.ndarray, "v"], n: int) -> tuple[np.ndarray, ...]:
    """Information, and the value most over-represented at the top, with its share and excess.

    Its share there, and by how much that exceeds its base rate; (k, p).
    """
    information = (
        _entropy(counts.joint.sum(axis=3), (0,))
        + _entropy(n * base[None], (1,))
        - _entropy(counts.joint, (0, 3))
    )
    best = (counts.top - base).argmax(axis=2)
    purity = np.take_along_axis(counts.top, best[..., None], axis=2)[..., 0]
    return information, best, purity, purity - base[best]


def _orders(
    numbers: np.ndarray, n_permutations: int, size: int, seed: int
) -> Iterator[Int[np.ndarray, "p m"]]:
    rng, step = np.random.default_rng(seed), max(1, _BLOCK // size)
    for start in range(0, n_permutations, step):
        yield rng.permuted(np.tile(numbers, (min(step, n_permutations - start), 1)), axis=1)


def _assigned(codes: Float[np.ndarray, "n k"]) -> Int[np.ndarray, "n"]:
    return np.where(codes.any(axis=1), np.abs(codes).argmax(axis=1), -1)


def _blocks(n: int, n_resamples: int) -> list[int]:
    """Resamples to draw at once, at least 100 wherever there are as many."""
    count = max(1, min(n_resamples // 100, n_resamples * n // (2 * _BLOCK)))
    return [len(part) for part in np.array_split(np.arange(n_resamples), count)]


def _resampled(
    labels: Int[np.ndarray, "n"], values: Int[np.ndarray, "n"], n_resamples: int, seed: int
) -> Float[np.ndarray, "r"]:
    """The agreement on resamples.

    Tables of shares as products of the sparse indicator of each row's
    cell with the resamples' shares.
    """
    shares = resampled_shares(len(labels), n_resamples, seed).T
    rng, shape = np.random.default_rng(seed), (int(labels.max()) + 1, int(values.max()) + 1)
    orders = [values, *rng.permuted(np.tile(values, (_NULLS, 1)), axis=1)]
    tables = [
        (_indicator(labels * shape[1] + order, shape[0] * shape[1]) @ shares).reshape(*shape, -1)
        for order in orders
    ]
    concepts, factor = (
        -xlogy(tables[0].sum(axis=1), tables[0].sum(axis=1)).sum(axis=0),
        _margin(tables[0]),
    )
    information, *nulls = [
        concepts + _margin(table) + xlogy(table, table).sum(axis=(0, 1)) for table in tables
    ]
    expected = np.mean(nulls, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (information - expected) / ((concepts + factor) / 2 - expected)


def _margin(table: np.ndarray) -> np.ndarray:
    shares = table.sum(axis=0)
    return -xlogy(shares, shares).sum(axis=0)


def _indicator(cells: Int[np.ndarray, "n"], n_cells: int) -> csr_array:
    return csr_array(
        (np.ones(len(cells)), (cells, np.arange(len(cells)))), shape=(n_cells, len(cells))
    )
