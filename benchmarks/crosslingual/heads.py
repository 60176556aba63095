"""Heads: how examples become model inputs, and how the model's outputs become a score (``scores.py``).

Each head is one transformers auto class and one metric. Scores are percentages, higher is better.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from . import scores
from .task import LANGUAGE, Question, TaggedWords, Text

IGNORE = -100  # torch's ignore_index: sub-words after a word's first, special tokens


class Classification:
    """One class for a text or a pair of texts. Metric: accuracy."""

    metric = "accuracy"
    auto_model = AutoModelForSequenceClassification
    collator = DataCollatorWithPadding

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int):
        self.tokenizer, self.labels, self.max_length = tokenizer, list(labels), max_length

    def features(self, examples: list[Text], training: bool, language: str = LANGUAGE) -> list[dict]:
        """Model inputs, here one per example; a head may make several of one."""
        if not examples:
            return []
        texts = [example.text for example in examples]
        pairs = None if examples[0].pair is None else [example.pair for example in examples]
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        return [
            {**{key: encoded[key][i] for key in encoded}, "labels": self.labels.index(example.label)}
            for i, example in enumerate(examples)
        ]

    def score(self, examples: list[Text], features: list[dict], outputs: np.ndarray, language: str) -> float:
        """``outputs``: logits, shape (features, labels)."""
        truth = np.array([self.labels.index(example.label) for example in examples])
        return 100 * float(np.mean(truth == outputs.argmax(-1)))


class Ranking(Classification):
    """Documents of a query ranked by their predicted relevance class. Metric: mean nDCG over queries.

    Labels are the relevance classes from worst to best, and their index is the gain. A query is a run of consecutive
    examples of one group.
    """

    metric = "nDCG (a query is a run of rows)"

    def score(self, examples, features, outputs, language) -> float:
        truth = [self.labels.index(example.label) for example in examples]
        return scores.query_ndcg([example.group for example in examples], truth, outputs.argmax(-1))


class Tagging:
    """A tag for each word, read at the word's first sub-word.

    Metric: F1 over entities when the tags are BIO, else the precision of runs of equal tags, both as XGLUE's. A word
    that does not fit into ``max_length`` is predicted "O", which is never a right part of speech.
    """

    auto_model = AutoModelForTokenClassification
    collator = DataCollatorForTokenClassification
    # SentencePiece puts a bare "▁" in front of most Chinese and many Thai words, and of no English one: a tag read
    # there would be read from a piece that carried none in training. XGLUE's own code drops all "▁" of the two.
    without_blanks = ("th", "zh")
    blank = "▁"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int):
        if not tokenizer.is_fast:
            raise ValueError("tagging needs a fast tokenizer (word_ids): this model has none")
        self.tokenizer, self.labels, self.max_length = tokenizer, list(labels), max_length
        self.entities = "O" in self.labels
        self.metric = f"{'entity F1' if self.entities else 'precision of tag runs'} (a word cut off counts as O)"

    def features(self, examples: list[TaggedWords], training: bool, language: str = LANGUAGE) -> list[dict]:
        return [self._feature(example, language)[0] for example in examples]

    def _feature(self, example: TaggedWords, language: str) -> tuple[dict, list[int]]:
        """Model inputs with labels, and the word that each labelled position begins."""
        encoded = self.tokenizer(list(example.words), is_split_into_words=True)
        pieces = self._pieces(encoded["input_ids"], encoded.word_ids(), language)
        ids, labels, words, previous = [], [], [], None
        for piece, word in pieces:
            first = word is not None and word != previous
            ids.append(piece)
            labels.append(self.labels.index(example.tags[word]) if first else IGNORE)
            words += [word] * first
            previous = word
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, words

    def _pieces(self, ids: list[int], word_ids: list[int | None], language: str) -> list[tuple[int, int | None]]:
        """(piece, word) within ``max_length``; words are None for the special pieces at both ends, which stay."""
        pieces = list(zip(ids, word_ids, strict=True))
        first = next((i for i, word in enumerate(word_ids) if word is not None), 1)
        behind = next((i for i, word in enumerate(reversed(word_ids)) if word is not None), 1)
        head, body, tail = pieces[:first], pieces[first : len(pieces) - behind], pieces[len(pieces) - behind :]
        if language in self.without_blanks:
            body = [(self._without_blank(piece), word) for piece, word in body]
            body = [(piece, word) for piece, word in body if piece is not None]
        return head + body[: self.max_length - len(head) - len(tail)] + tail

    def _without_blank(self, piece: int) -> int | None:
        """The piece less its "▁", if the vocabulary has it so; None if nothing is left."""
        text = self.tokenizer.convert_ids_to_tokens(piece)
        bare = text.replace(self.blank, "")
        if not bare:
            return None
        found = self.tokenizer.convert_tokens_to_ids(bare)
        return piece if bare == text or found in (None, self.tokenizer.unk_token_id) else found

    def score(self, examples: list[TaggedWords], features: list[dict], outputs: np.ndarray, language: str) -> float:
        """``outputs``: logits, shape (features, longest, labels)."""
        predicted = []
        for example, logits in zip(examples, outputs, strict=True):
            feature, words = self._feature(example, language)
            positions = [i for i, label in enumerate(feature["labels"]) if label != IGNORE]
            tags = ["O"] * len(example.words)
            for word, position in zip(words, positions, strict=True):
                tags[word] = self.labels[int(logits[position].argmax())]
            predicted.append(tags)
        metric = scores.entity_f1 if self.entities else scores.run_precision
        return metric([example.tags for example in examples], predicted)


class Extraction:
    """An answer's span in a context. Metric: SQuAD's F1 with MLQA's normalisation by language.

    A long context is read in overlapping windows; each is one feature.
    """

    metric = "F1"
    auto_model = AutoModelForQuestionAnswering
    collator = DataCollatorWithPadding
    max_answer = 30  # tokens, as in SQuAD baselines
    best = 20  # starts and ends looked at

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int):
        if not tokenizer.is_fast:
            raise ValueError("question answering needs a fast tokenizer (offsets): this model has none")
        self.tokenizer, self.max_length = tokenizer, max_length

    def _windows(self, example: Question):
        return self.tokenizer(
            example.question,
            example.context,
            truncation="only_second",
            max_length=self.max_length,
            stride=min(128, self.max_length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def features(self, examples: list[Question], training: bool, language: str = LANGUAGE) -> list[dict]:
        features = []
        for example in examples:
            encoded = self._windows(example)
            for window in range(len(encoded["input_ids"])):
                feature = {key: encoded[key][window] for key in self.tokenizer.model_input_names if key in encoded}
                if training:
                    start, end = self._span(example, encoded, window)
                    feature |= {"start_positions": start, "end_positions": end}
                features.append(feature)
        return features

    def _span(self, example: Question, encoded, window: int) -> tuple[int, int]:
        """First and last token of the answer; (0, 0), the <s> token, where this window lacks it."""
        text, begin = example.answers[0]
        tokens = _context_tokens(encoded, window)
        inside = [t for t, (a, b) in tokens.items() if a < begin + len(text) and b > begin]
        complete = inside and tokens[inside[0]][0] <= begin and tokens[inside[-1]][1] >= begin + len(text)
        return (inside[0], inside[-1]) if complete else (0, 0)

    def score(self, examples: list[Question], features: list[dict], outputs: tuple, language: str) -> float:
        """``outputs``: start and end logits, each of shape (features, longest)."""
        starts, ends = outputs
        row, best_f1 = 0, []
        for example in examples:
            encoded = self._windows(example)
            answer, best = "", -np.inf
            for window in range(len(encoded["input_ids"])):
                tokens = _context_tokens(encoded, window)
                found = self._best_span(tokens, starts[row], ends[row])
                if found and found[0] > best:
                    best, first, last = found
                    answer = example.context[tokens[first][0] : tokens[last][1]]
                row += 1
            best_f1.append(max(scores.answer_f1(answer, text, language) for text, _ in example.answers))
        return 100 * float(np.mean(best_f1))

    def _best_span(self, tokens: dict, start: np.ndarray, end: np.ndarray) -> tuple[float, int, int] | None:
        positions = np.array(list(tokens))
        if not len(positions):
            return None
        firsts = positions[np.argsort(-start[positions])[: self.best]]
        lasts = positions[np.argsort(-end[positions])[: self.best]]
        spans = [(start[a] + end[b], a, b) for a in firsts for b in lasts if a <= b < a + self.max_answer]
        return max(spans, default=None)


def _context_tokens(encoded, window: int) -> dict[int, tuple[int, int]]:
    """Position in the window -> characters of the context."""
    offsets = encoded["offset_mapping"][window]
    return {t: tuple(offsets[t]) for t, part in enumerate(encoded.sequence_ids(window)) if part == 1}


HEADS = {"classification": Classification, "ranking": Ranking, "tagging": Tagging, "extraction": Extraction}


def majority(examples: list[Text]) -> float:
    """Accuracy of always saying the most frequent label, in per cent."""
    return 100 * Counter(example.label for example in examples).most_common(1)[0][1] / len(examples)
