"""Metrics as XGLUE's official evaluations compute them, from plain lists, in per cent.

Sources: XGLUE's evaluation (https://github.com/microsoft/Unicoder, understanding/), which scores tags with seqeval and
queries with scikit-learn's nDCG; MLQA's (https://github.com/facebookresearch/MLQA), which follows SQuAD's.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from seqeval.metrics import f1_score
from sklearn.metrics import ndcg_score

Tags = Sequence[Sequence[str]]  # a list of tags for each sentence


def entity_f1(truth: Tags, predicted: Tags) -> float:
    """F1 over entities in BIO tags."""
    return 100 * float(f1_score([*map(list, truth)], [*map(list, predicted)], zero_division=0))


def tag_runs(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(tag, first, last) of each run of equal tags: what seqeval takes for an entity where tags have no B- or I-.

    "O" is outside. seqeval reads a tag's first letter as a position, and S as "single": each SCONJ or SYM is a run of
    its own.
    """
    runs, at = set(), 0
    for tag, group in groupby(tags):
        length = len(list(group))
        if tag.startswith("S"):
            runs |= {(tag, i, i) for i in range(at, at + length)}
        elif tag != "O":
            runs.add((tag, at, at + length - 1))
        at += length
    return runs


def run_precision(truth: Tags, predicted: Tags) -> float:
    """The share of predicted runs of tags that are true ones: XGLUE's score of part-of-speech tags.

    It is lower than accuracy over words, since one wrong word spoils a run. Without predictions it is 0.
    """
    true = {(i, *run) for i, tags in enumerate(truth) for run in tag_runs(tags)}
    found = {(i, *run) for i, tags in enumerate(predicted) for run in tag_runs(tags)}
    return 100 * len(true & found) / len(found) if found else 0.0


def runs_of(groups: Sequence[str]) -> list[range]:
    """The rows of each query: a run of consecutive equal ``groups``. A query that comes again is another one."""
    found, at = [], 0
    for _, rows in groupby(groups):
        length = len(list(rows))
        found.append(range(at, at + length))
        at += length
    return found


def query_ndcg(groups: Sequence[str], truth: Sequence[int], predicted: Sequence[float]) -> float:
    """Mean nDCG over queries of two rows or more; ``truth`` are gains. Ties are averaged. nan without such a query."""
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    scores = [ndcg_score([truth[rows]], [predicted[rows]]) for rows in runs_of(groups) if len(rows) > 1]
    return 100 * float(np.mean(scores)) if scores else float("nan")


_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\sال^|ال",
}
_IDEOGRAPHS = re.compile(r"[\u4e00-\u9fa5]")


def _is_punctuation(character: str) -> bool:
    # ASCII's own list holds nine that Unicode calls symbols: $+<=>^`|~
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def answer_words(text: str, language: str) -> list[str]:
    """Lower case, without punctuation and articles; in Chinese every ideograph is a word."""
    text = "".join(character for character in text.lower() if not _is_punctuation(character))
    if language in _ARTICLES:
        text = re.sub(_ARTICLES[language], " ", text)
    if language == "zh":
        text = _IDEOGRAPHS.sub(r" \g<0> ", text)
    return text.split()


def answer_f1(prediction: str, truth: str, language: str) -> float:
    """Harmonic mean of the precision and recall of words, in [0, 1]. Two answers without words have 0 in common."""
    predicted, true = answer_words(prediction, language), answer_words(truth, language)
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true)) if common else 0.0
