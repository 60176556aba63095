"""XGLUE's nine understanding tasks, from the folder ``xglue_full_dataset``: English training, dev and test by language.

Source: Liang et al. 2020, "XGLUE: A New Benchmark Dataset for Cross-lingual Pre-training, Understanding and
Generation". Files and columns are those of its distribution, scores as in its own evaluation.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .task import LANGUAGE, Question, TaggedWords, Task, Text

_XNLI = "ar bg de el en es fr hi ru sw th tr ur vi zh"
_POS = "ar bg de el en es fr hi it nl pl pt ru th tr ur vi zh"
_NER_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM",
    "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X",
)  # fmt: skip
_NEWS = (
    "foodanddrink", "sports", "news", "entertainment", "health",
    "video", "finance", "travel", "lifestyle", "autos",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a task's files are, below its folder, and what they hold. ``{l}`` is the language, ``{s}`` dev or test."""

    head: str
    labels: tuple[str, ...]
    languages: str
    train: str
    evaluate: str
    read: Callable[[Path, "Source"], list]
    columns: tuple[str, ...] = ()  # of a tab-separated file; the label is always the last
    text: tuple[str, ...] = ()  # the columns that make the text, and those that make the second text
    pair: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()  # other spellings of labels


def load(name: str, folder: Path) -> Task:
    """The task ``name`` from XGLUE's folder.

    Raises:
        ValueError: on an unknown name, and on a missing or malformed file, naming file and line.
    """
    if name not in TASKS:
        raise ValueError(f"unknown XGLUE task {name!r}: choose from {', '.join(TASKS)}")
    source = TASKS[name]
    root = Path(folder) / name.upper()
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; {folder} must be XGLUE's folder xglue_full_dataset")

    def split(part: str) -> dict[str, list]:
        return {
            language: source.read(root / source.evaluate.format(l=language, s=part), source)
            for language in source.languages.split()
        }

    train = source.read(root / source.train.format(l=LANGUAGE), source)
    return Task(name, source.head, source.labels, train, split("dev"), split("test"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1. Only a newline ends a line: texts hold other separators."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        yield number, line.removesuffix("\r")


def _label(value: str, source: Source, where: str) -> str:
    value = dict(source.aliases).get(value, value)
    if value not in source.labels:
        raise ValueError(f"{where}: label {value!r}, expected one of {', '.join(source.labels)}")
    return value


def _not_empty(examples: list, path: Path) -> list:
    if not examples:
        raise ValueError(f"{path}: no examples")
    return examples


def _read_table(path: Path, source: Source) -> list[Text]:
    """Tab-separated columns without quoting. A first line whose last cell is "label" is a header."""
    examples = []
    for number, line in _lines(path):
        cells = line.split("\t")
        if number == 1 and cells[-1].strip().lower() == "label":
            continue
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(cells) != len(source.columns):
            raise ValueError(
                f"{where}: {len(cells)} tab-separated columns, "
                f"expected {len(source.columns)}: {', '.join(source.columns)}"
            )
        row = dict(zip(source.columns, cells, strict=True))
        examples.append(
            Text(
                " ".join(row[column] for column in source.text),
                _label(cells[-1].strip(), source, where),
                pair=" ".join(row[column] for column in source.pair) if source.pair else None,
                group=row["query"] if source.head == "ranking" else None,
            )
        )
    return _not_empty(examples, path)


def _read_tags(path: Path, source: Source) -> list[TaggedWords]:
    """A word and its tag, separated by a space, on each line; a blank line ends a sentence (CoNLL)."""
    examples: list[TaggedWords] = []
    words: list[str] = []
    tags: list[str] = []

    def end() -> None:
        if words:
            examples.append(TaggedWords(tuple(words), tuple(tags)))
            words.clear()
            tags.clear()

    for number, line in _lines(path):
        if not line.strip() or line.startswith("-DOCSTART-"):
            end()
            continue
        cells = line.rstrip().split(" ")
        if len(cells) < 2:
            raise ValueError(f"{path}:{number}: {line!r}, expected a word and a tag separated by a space")
        words.append(cells[0])
        tags.append(_label(cells[-1], source, f"{path}:{number}"))
    end()
    return _not_empty(examples, path)


def _read_squad(path: Path, source: Source) -> list[Question]:
    """SQuAD 1.1's JSON. An answer must stand in its context at its place; blanks at its ends are no part of it."""
    text = "\n".join(line for _, line in _lines(path))
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    examples = []
    try:
        for article in data["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for qa in paragraph["qas"]:
                    answers = tuple((answer["text"], answer["answer_start"]) for answer in qa["answers"])
                    for answer, start in answers:
                        if context[start : start + len(answer)] != answer:
                            line = _line_of(text, qa["id"])
                            raise ValueError(
                                f"{path}:{line}: question {qa['id']}: no {answer!r} at {start} in its context"
                            )
                    if not answers:
                        raise ValueError(f"{path}:{_line_of(text, qa['id'])}: question {qa['id']} has no answer")
                    examples.append(Question(qa["id"], qa["question"], context, tuple(map(_stripped, answers))))
    except (KeyError, TypeError) as error:
        last = _line_of(text, examples[-1].id) if examples else 1
        raise ValueError(f"{path}:{last}: no SQuAD format: {error!r} missing or wrong after question "
                         f"{len(examples)}") from None  # fmt: skip
    return _not_empty(examples, path)


def _stripped(answer: tuple[str, int]) -> tuple[str, int]:
    """No token covers a blank, so an answer with one would look as if its context lacked it."""
    text, start = answer
    return text.strip(), start + len(text) - len(text.lstrip())


def _line_of(text: str, identifier: str) -> int:
    return text[: max(0, text.find(json.dumps(identifier)))].count("\n") + 1


TASKS = {
    "xnli": Source(
        "classification",
        ("contradiction", "entailment", "neutral"),
        _XNLI,
        "multinli.train.{l}.tsv",
        "{l}.{s}",
        _read_table,
        ("premise", "hypothesis", "label"),
        ("premise",),
        ("hypothesis",),
        (("contradictory", "contradiction"),),
    ),
    "nc": Source(
        "classification",
        _NEWS,
        "de en es fr ru",
        "xglue.nc.{l}.train",
        "xglue.nc.{l}.{s}",
        _read_table,
        ("title", "body", "category"),
        ("title",),
        ("body",),
    ),
    "ner": Source("tagging", _NER_TAGS, "de en es nl", "{l}.train", "{l}.{s}", _read_tags),
    "pos": Source("tagging", _UPOS, _POS, "{l}.train", "{l}.{s}", _read_tags),
    "pawsx": Source(
        "classification",
        ("0", "1"),
        "de en es fr",
        "{l}/train.tsv",
        "{l}/{s}_2k.tsv",
        _read_table,
        ("id", "sentence1", "sentence2", "label"),
        ("sentence1",),
        ("sentence2",),
    ),
    "qam": Source(
        "classification",
        ("0", "1"),
        "de en fr",
        "xglue.qam.{l}.train",
        "xglue.qam.{l}.{s}",
        _read_table,
        ("question", "passage", "label"),
        ("question",),
        ("passage",),
    ),
    "qadsm": Source(
        "classification",
        ("Bad", "Good"),
        "de en fr",
        "xglue.qadsm.{l}.train",
        "xglue.qadsm.{l}.{s}",
        _read_table,
        ("query", "ad title", "description", "label"),
        ("query",),
        ("ad title", "description"),
    ),
    "wpr": Source(
        "ranking",
        ("0", "1", "2", "3", "4"),
        "de en es fr it pt zh",
        "xglue.wpr.{l}.train",
        "xglue.wpr.{l}.{s}",
        _read_table,
        ("query", "title", "snippet", "label"),
        ("query",),
        ("title", "snippet"),
    ),
    "mlqa": Source(
        "extraction",
        (),
        "ar de en es hi vi zh",
        "squad1.1/train-v1.1.json",
        "MLQA_V1/{s}/{s}-context-{l}-question-{l}.json",
        _read_squad,
    ),
}
