"""From the labels that published files hold to multi-hot columns.

sentiment, a real number a sample      negative (< 0), neutral (= 0), positive (> 0): one of them is 1
a class number a sample                one column a class, one of them is 1
intensities of emotions                present where > 0
pairs [absent, present]                present where the second is larger
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmer_fast.data.errors import DataError
from mmer_fast.data.sequences import describe

EMOTIONS = ["happy", "sad", "anger", "surprise", "disgust", "fear"]  # the columns of CMU-MOSEI after its sentiment
SENTIMENT = ["negative", "neutral", "positive"]
IEMOCAP_FOUR = ["neutral", "happy", "sad", "angry"]
IEMOCAP_SIX = ["hap", "sad", "neu", "ang", "exc", "fru"]  # in the order of MMGCN's class numbers
SENTIMENT_NOTE = "labels are classes of the sentiment: negative (< 0), neutral (= 0), positive (> 0)"


def as_numbers(where: str, value: Any, n: int | None = None) -> np.ndarray:
    """``value`` as a float64 array of at least one axis whose values are finite; lists of numbers will do.

    Raises:
        DataError: not numbers, not finite, or another count than ``n``.
    """
    try:
        array = np.asarray(value) if isinstance(value, (list, tuple)) else value
    except ValueError:  # lists of different lengths
        array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim == 0 or len(array) == 0:
        raise DataError(f"{where}: expected numbers, one row a sample; got {describe(value)}")
    if n is not None and len(array) != n:
        raise DataError(f"{where}: expected {n} rows; got {len(array)}")
    if not np.isfinite(array).all():
        raise DataError(f"{where}: expected finite numbers; got {array[~np.isfinite(array)][0]}")
    return array.astype(np.float64)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32; what is beyond its range becomes inf."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def sentiment_classes(values_n: np.ndarray) -> np.ndarray:
    """(N, 3) uint8, one 1 a row: negative, neutral, positive."""
    return np.stack([values_n < 0, values_n == 0, values_n > 0], axis=1).astype(np.uint8)


def one_hot(where: str, classes_n: np.ndarray, count: int) -> np.ndarray:
    """(N, K) uint8 of class numbers.

    Raises:
        DataError: a number is not whole or lies outside [0, K).
    """
    wrong = classes_n[~((classes_n >= 0) & (classes_n < count) & (classes_n == np.trunc(classes_n)))]
    if wrong.size:
        raise DataError(f"{where}: expected class numbers in [0, {count}); got {wrong[0]:g}")
    return (classes_n[:, None] == np.arange(count)).astype(np.uint8)


def numbered(count: int, notes: list[str]) -> list[str]:
    """label_0, label_1, ... and a note that the file names none."""
    notes.append(f"labels are numbered: the file does not name its {count} labels")
    return [f"label_{k}" for k in range(count)]


def from_columns(where: str, values_nk: np.ndarray, notes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels of CMU-MOSEI's columns: (N, 1) sentiment, (N, 6) emotions, (N, 7) sentiment and emotions.

    Returns:
        (N, K) uint8 and the K names.

    Raises:
        DataError: another number of columns.
    """
    width = values_nk.shape[1]
    if width == 1:
        notes.append(SENTIMENT_NOTE)
        return sentiment_classes(values_nk[:, 0]), list(SENTIMENT)
    if width not in (6, 7):
        raise DataError(
            f"{where}: expected 1 column (sentiment), 6 ({', '.join(EMOTIONS)}) or 7 (sentiment and these); got {width}"
        )
    notes.append(
        f"the last 6 label columns are taken as {', '.join(EMOTIONS)} (as in CMU-MOSEI), present where above 0"
    )
    return (values_nk[:, -6:] > 0).astype(np.uint8), list(EMOTIONS)


def from_pairs(values_nk2: np.ndarray, notes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels of (N, K, 2) pairs [absent, present]; four are those of IEMOCAP as MulT orders them."""
    labels_nk = (values_nk2[:, :, 1] > values_nk2[:, :, 0]).astype(np.uint8)
    count = labels_nk.shape[1]
    if count == len(IEMOCAP_FOUR):
        return labels_nk, list(IEMOCAP_FOUR)
    return labels_nk, numbered(count, notes)
