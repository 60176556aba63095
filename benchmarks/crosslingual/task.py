"""What a cross-lingual task is: English training text, dev and test text by language, and a head."""

from dataclasses import dataclass, field, replace
from itertools import groupby


@dataclass(frozen=True)
class Text:
    """A text or a pair of texts with a class.

    ``group`` is the query in a ranking task: consecutive examples with the same one belong together.
    """

    text: str
    label: str
    pair: str | None = None
    group: str | None = None

    def texts(self) -> list[str]:
        return [self.text] if self.pair is None else [self.text, self.pair]


@dataclass(frozen=True)
class TaggedWords:
    """A sentence in words, each with a tag."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    def texts(self) -> list[str]:
        return list(self.words)


@dataclass(frozen=True)
class Question:
    """A question, its context, and the answers as (text, first character in the context)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]

    def texts(self) -> list[str]:
        return [self.question, self.context]


Example = Text | TaggedWords | Question
LANGUAGE = "en"  # the language of all training text


@dataclass(frozen=True)
class Task:
    """Examples of one kind. ``dev`` and ``test`` map a language to its examples; ``train`` is English."""

    name: str
    head: str  # a key of heads.HEADS
    labels: tuple[str, ...]  # in the order of the model's classes
    train: list[Example] = field(repr=False)
    dev: dict[str, list[Example]] = field(repr=False)
    test: dict[str, list[Example]] = field(repr=False)

    @property
    def languages(self) -> list[str]:
        """English first, then by name."""
        return sorted(self.test or self.dev, key=lambda language: (language != LANGUAGE, language))

    def texts(self) -> list[str]:
        """Every string of the task."""
        examples = [self.train, *self.dev.values(), *self.test.values()]
        return [text for part in examples for example in part for text in example.texts()]

    def counts(self) -> dict[str, int]:
        """Number of examples, of all languages together."""
        return {
            "train": len(self.train),
            "dev": sum(map(len, self.dev.values())),
            "test": sum(map(len, self.test.values())),
        }

    def limited(self, train: int | None = None, dev: int | None = None, test: int | None = None) -> "Task":
        """The same task with at most ``train`` training examples, and ``dev`` and ``test`` examples a language.

        They are taken at even distances, so that a sorted file keeps its classes. A query is taken whole or not at
        all, since a part of it has another score; a limit below the first query's length still takes that one.
        """

        for name, count in (("train", train), ("dev", dev), ("test", test)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")

        def part(by_language, count):
            return {language: _spread(examples, count) for language, examples in by_language.items()}

        return replace(self, train=_spread(self.train, train), dev=part(self.dev, dev), test=part(self.test, test))


def _spread(examples: list[Example], count: int | None) -> list[Example]:
    if count is None or len(examples) <= count:
        return examples
    units = [list(unit) for _, unit in groupby(enumerate(examples), key=_unit)]
    kept = []
    for wanted in range(len(units) * count // len(examples) + 1, 0, -1):
        kept = [example for i in range(wanted) for _, example in units[i * len(units) // wanted]]
        if len(kept) <= count:
            break
    return kept


def _unit(numbered: tuple[int, Example]) -> str | int:
    """What an example must not be torn from: its query, else itself."""
    number, example = numbered
    query = getattr(example, "group", None)
    return number if query is None else query
