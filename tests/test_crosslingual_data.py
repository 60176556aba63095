"""Tasks and heads of benchmarks/crosslingual: files in the exact formats, good and broken, and metrics by hand."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from crosslingual_files import ROWS, write, write_model
from seqeval.metrics import precision_score
from transformers import AutoTokenizer

from benchmarks.crosslingual import heads, intents, multiemo, scores, tasks, xglue
from benchmarks.crosslingual.task import Question, TaggedWords, Task, Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("model")))


# XGLUE's files


@pytest.mark.parametrize("name", xglue.TASKS)
def test_every_task_loads(name, tmp_path):
    task = xglue.load(name, write(name, tmp_path))
    languages = xglue.TASKS[name].languages.split()
    assert task.languages == ["en"] + sorted(set(languages) - {"en"})
    assert len(task.train) == ROWS["train"]
    assert {language: len(examples) for language, examples in task.dev.items()} == dict.fromkeys(languages, ROWS["dev"])
    assert {language: len(examples) for language, examples in task.test.items()} == dict.fromkeys(
        languages, ROWS["test"]
    )


def test_columns_become_the_right_texts(tmp_path):
    for name in ("xnli", "pawsx", "qadsm", "wpr"):
        write(name, tmp_path)
    (tmp_path / "XNLI/multinli.train.en.tsv").write_text('premise\thypo\tlabel\na "b\tc\tcontradictory\r\n')
    (tmp_path / "PAWSX/en/train.tsv").write_text("id\tsentence1\tsentence2\tlabel\n9\tone\ttwo\t1\n")
    (tmp_path / "QADSM/xglue.qadsm.en.train").write_text("query\ttitle\tdescription\tGood\n")
    (tmp_path / "WPR/xglue.wpr.en.train").write_text("query\ttitle\tsnippet\t4\n")
    assert xglue.load("xnli", tmp_path).train == [Text('a "b', "contradiction", "c")]
    assert xglue.load("pawsx", tmp_path).train == [Text("one", "1", "two")]
    assert xglue.load("qadsm", tmp_path).train == [Text("query", "Good", "title description")]
    assert xglue.load("wpr", tmp_path).train == [Text("query", "4", "title snippet", "query")]


def test_sentences_of_words_and_tags(tmp_path):
    write("ner", tmp_path)
    (tmp_path / "NER/en.train").write_text("-DOCSTART- -X- O O\n\nEU B-ORG\nrejects O\n\n\nPeter B-PER")
    assert xglue.load("ner", tmp_path).train == [
        TaggedWords(("EU", "rejects"), ("B-ORG", "O")),
        TaggedWords(("Peter",), ("B-PER",)),
    ]


BROKEN = [
    ("xnli", "en.dev", "a\tb\tneutral\na\tb\n", r"en\.dev:2: 2 tab-separated columns, expected 3: premise, hypothesis"),
    (
        "xnli",
        "th.test",
        "a\tb\tmaybe\n",
        r"th\.test:1: label 'maybe', expected one of contradiction, entailment, neutral",
    ),
    ("nc", "xglue.nc.en.train", "a\tb\tsports\na\tb\tweather\n", r"xglue\.nc\.en\.train:2: label 'weather'"),
    ("ner", "de.test", "Anna B-PER\nruns\n", r"de\.test:2: 'runs', expected a word and a tag"),
    ("ner", "nl.dev", "Anna B-PERSON\n", r"nl\.dev:1: label 'B-PERSON'"),
    ("pos", "zh.dev", "\n\n", r"zh\.dev: no examples"),
    ("pawsx", "fr/dev_2k.tsv", "id\tsentence1\tsentence2\tlabel\n1\ta\tb\t2\n", r"dev_2k\.tsv:2: label '2'"),
    ("qam", "xglue.qam.de.test", "question\tpassage\n", r"xglue\.qam\.de\.test:1: 2 tab-separated columns, expected 3"),
    ("qadsm", "xglue.qadsm.fr.dev", "q\tt\td\tGood\n\nq\tt\tGood\n", r"xglue\.qadsm\.fr\.dev:3: 3 tab-separated"),
    ("wpr", "xglue.wpr.it.test", "q\tt\ts\t5\n", r"xglue\.wpr\.it\.test:1: label '5', expected one of 0, 1, 2, 3, 4"),
    ("wpr", "xglue.wpr.zh.dev", b"q\tt\ts\t1\nq\t\xff\ts\t1\n", r"xglue\.wpr\.zh\.dev:2: not UTF-8"),
    ("mlqa", "MLQA_V1/dev/dev-context-de-question-de.json", '{"data": [\n{"x": 1},\n}', r"de\.json:3: not JSON"),
    ("mlqa", "squad1.1/train-v1.1.json", '{"version": 1}', r"train-v1\.1\.json:1: no SQuAD format: KeyError\('data'\)"),
    (
        "mlqa",
        "MLQA_V1/test/test-context-zh-question-zh.json",
        '{"data": [{"paragraphs": [{"context": "我爱你",\n"qas": [{"id": "q7", "question": "?",\n'
        '"answers": [{"text": "爱", "answer_start": 2}]}]}]}]}',
        r"zh\.json:2: question q7: no '爱' at 2 in its context",
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BROKEN, ids=[f"{b[0]}-{b[1][-12:]}" for b in BROKEN])
def test_broken_files_are_named_with_their_line(name, file, content, message, tmp_path):
    write(name, tmp_path)
    (tmp_path / name.upper() / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        xglue.load(name, tmp_path)


def test_missing_files_and_names(tmp_path):
    write("qam", tmp_path)
    (tmp_path / "QAM/xglue.qam.fr.dev").unlink()
    with pytest.raises(ValueError, match=r"xglue\.qam\.fr\.dev: no such file"):
        xglue.load("qam", tmp_path)
    with pytest.raises(ValueError, match="NC: no such folder; .* must be XGLUE's folder"):
        xglue.load("nc", tmp_path)
    with pytest.raises(ValueError, match="unknown task 'glue': choose from intents, multiemo, xnli"):
        tasks.load("glue")
    with pytest.raises(ValueError, match="needs the folder of XGLUE's data"):
        tasks.load("nc")


def test_limited_keeps_the_spread():
    examples = [Text(str(i), "ab"[i >= 50]) for i in range(100)]
    task = Task("t", "classification", ("a", "b"), examples, {}, {"en": examples, "de": examples[:3]})
    small = task.limited(10, 1, 4)
    assert [e.text for e in small.train] == [str(i) for i in range(0, 100, 10)]
    assert [e.label for e in small.test["en"]] == ["a", "a", "b", "b"]
    assert small.test["de"] == examples[:3]
    assert task.limited() == task


# Heads


def test_classification_features_and_accuracy(tokenizer):
    head = heads.Classification(tokenizer, ["no", "yes"], 12)
    examples = [Text("the cat", "yes", "a dog"), Text("sat " * 20, "no", "x"), Text("a", "yes", "b")]
    features = head.features(examples, training=False)
    assert [f["labels"] for f in features] == [1, 0, 1]
    assert features[0]["input_ids"] == tokenizer("the cat", "a dog", truncation=True, max_length=12)["input_ids"]
    assert max(len(f["input_ids"]) for f in features) == 12
    assert head.score(examples, features, np.array([[0, 1], [2, 1], [1, 0]]), "en") == pytest.approx(200 / 3)
    assert heads.majority(examples) == pytest.approx(200 / 3)


def test_ranking_score_is_ndcg_per_query(tokenizer):
    head = heads.Ranking(tokenizer, ["0", "1", "2"], 12)
    examples = [Text("q", "2", "a", "q"), Text("q", "0", "b", "q"), Text("q", "1", "c", "q"), Text("r", "2", "d", "r")]
    logits = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]])  # classes 1, 2, 0: ranking b, a, c; r is alone
    dcg = 0 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)
    ideal = 2 / np.log2(2) + 1 / np.log2(3)
    assert head.score(examples, [], logits, "en") == pytest.approx(100 * dcg / ideal)
    assert np.isnan(head.score(examples[3:], [], logits[3:], "en"))


def test_tags_stand_at_first_subwords(tokenizer):
    head = heads.Tagging(tokenizer, ["O", "B-PER", "I-PER"], 64)
    example = TaggedWords(("the", "Anna", "я"), ("O", "B-PER", "I-PER"))
    (feature,) = head.features([example], training=True)
    words = tokenizer(list(example.words), is_split_into_words=True).word_ids()
    seen = [(word, label) for word, label in zip(words, feature["labels"], strict=True) if label != heads.IGNORE]
    assert seen == [(0, 0), (1, 1), (2, 2)]
    assert feature["labels"].count(heads.IGNORE) == len(words) - 3 > 3


def _right(features, classes):
    """Logits that say every label of ``features``."""
    logits = np.zeros((len(features), max(len(f["labels"]) for f in features), classes))
    for row, feature in zip(logits, features, strict=True):
        for position, label in enumerate(feature["labels"]):
            row[position, max(label, 0)] = 1
    return logits


def test_entities_behind_max_length_are_missed(tokenizer):
    head = heads.Tagging(tokenizer, ["O", "B-PER", "I-PER"], 16)
    examples = [
        TaggedWords(("Anna", "cat"), ("B-PER", "O")),
        TaggedWords(("a",) * 12 + ("Anna",), ("O",) * 12 + ("B-PER",)),
    ]
    features = head.features(examples, training=False)
    assert all(len(f["input_ids"]) <= 16 for f in features)
    # both entities, one of them behind max_length: precision 1, recall 1/2
    assert head.metric.startswith("entity F1")
    assert head.score(examples, features, _right(features, 3), "en") == pytest.approx(100 * 2 / 3)


def test_words_cut_off_are_wrong_parts_of_speech(tokenizer):
    head = heads.Tagging(tokenizer, ["ADJ", "NOUN"], 16)
    # "Anna" is four pieces behind a blank: with <s> and </s> two of the three words fit
    examples = [TaggedWords(("Anna", "Anna", "Anna", "Anna"), ("NOUN", "ADJ", "NOUN", "ADJ"))]
    features = head.features(examples, training=False)
    labels = [label for label in features[0]["labels"] if label != heads.IGNORE]
    assert len(features[0]["input_ids"]) == 16 and labels == [1, 0, 1]
    # three runs are predicted, all right; the last word, "ADJ", is not predicted as the first label
    assert head.score(examples, features, _right(features, 2), "en") == 100.0
    everything_first = np.eye(2)[np.zeros((1, 16), dtype=int)]
    # the predictions ADJ ADJ ADJ O are one run, which is none of NOUN, ADJ, NOUN, ADJ
    assert head.score(examples, features, everything_first, "en") == 0.0


@pytest.mark.parametrize(("language", "words", "pieces"), [
    ("en", ("爱", "the"), ["<s>", "▁", "爱", "▁the", "</s>"]),
    ("zh", ("爱", "的", "the"), ["<s>", "爱", "<unk>", "▁the", "</s>"]),
    ("th", ("爱",), ["<s>", "爱", "</s>"]),
])  # fmt: skip
def test_bare_blanks_carry_no_tag_in_chinese_and_thai(tokenizer, language, words, pieces):
    head = heads.Tagging(tokenizer, ["NOUN"], 16)
    example = TaggedWords(words, ("NOUN",) * len(words))
    (feature,) = head.features([example], training=False, language=language)
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == pieces
    # each word's first piece that is left has its tag
    assert sum(label != heads.IGNORE for label in feature["labels"]) == len(words)
    assert head.score([example], [feature], _right([feature], 1), language) == 100.0


# Metrics by hand


def test_tag_runs():
    assert scores.tag_runs([]) == set() == scores.tag_runs(["O", "O"])
    assert scores.tag_runs("NOUN NOUN VERB O NOUN".split()) == {("NOUN", 0, 1), ("VERB", 2, 2), ("NOUN", 4, 4)}
    # seqeval takes a first S for "single"
    assert scores.tag_runs("SYM SYM SCONJ".split()) == {("SYM", 0, 0), ("SYM", 1, 1), ("SCONJ", 2, 2)}


def test_run_precision_by_hand():
    truth = ["DET NOUN NOUN VERB".split(), "PRON VERB".split()]
    # sentence 1: runs DET, NOUN (one word only), ADJ, VERB: 2 of 4 are true; sentence 2: PRON, NOUN: 1 of 2
    predicted = ["DET NOUN ADJ VERB".split(), "PRON NOUN".split()]
    assert scores.run_precision(truth, predicted) == pytest.approx(100 * 3 / 6)
    assert scores.run_precision(truth, truth) == 100.0
    assert scores.run_precision(truth, [["O"] * 4, ["O"] * 2]) == 0.0
    # a word that is cut off joins no run, and breaks the true one
    assert scores.run_precision([["NOUN", "NOUN"]], [["NOUN", "O"]]) == 0.0


@pytest.mark.filterwarnings("ignore:.* seems not to be NE tag")
def test_run_precision_is_seqeval_s():
    """On tags that seqeval 1.2.2 does not confuse: it takes CCONJ and SCONJ for one, and X for the same as O."""
    rng = np.random.default_rng(0)
    tags = np.array("ADJ ADP NOUN NUM VERB DET PUNCT INTJ SYM O".split())
    truth, predicted = ([[str(t) for t in tags[rng.integers(0, 10, 12)]] for _ in range(60)] for _ in range(2))
    predicted = [
        [t if keep else p for t, p, keep in zip(ts, ps, rng.random(12) < 0.7, strict=True)]
        for ts, ps in zip(truth, predicted, strict=True)
    ]
    assert scores.run_precision(truth, predicted) == pytest.approx(100 * precision_score(truth, predicted))


def test_queries_are_runs_of_rows():
    assert scores.runs_of(["a", "a", "b", "a"]) == [range(0, 2), range(2, 3), range(3, 4)]
    truth, predicted = [1, 0, 3, 0, 2], [0, 1, 1, 1, 0]
    # q, q: the better row is ranked last; r alone is left out; q again, two rows: ranked in the wrong order
    first = (1 / np.log2(3)) / 1
    second = (2 / np.log2(3)) / 2
    found = scores.query_ndcg(["q", "q", "r", "q", "q"], truth, predicted)
    assert found == pytest.approx(100 * (first + second) / 2)


def test_tied_documents_share_their_places():
    # both documents are predicted 1: gains 2 and 0 take the two places in turn
    gain = 2 * (1 / np.log2(2) + 1 / np.log2(3)) / 2
    assert scores.query_ndcg(["q", "q"], [2, 0], [1, 1]) == pytest.approx(100 * gain / 2)


def test_limits_tear_no_query():
    rows = [Text("x", "0", str(i), group=query) for i, query in enumerate("aaabbbbccddddde")]
    task = Task("t", "ranking", ("0",), rows, {"en": rows}, {"en": rows})
    for limit in range(3, 16):
        kept = task.limited(limit, limit, limit)
        assert kept.train == kept.dev["en"] == kept.test["en"] and len(kept.train) <= limit
        for query in {row.group for row in kept.train}:
            assert [r for r in kept.train if r.group == query] == [r for r in rows if r.group == query]
    assert len(task.limited(14).train) >= 10
    assert [row.group for row in task.limited(1).train] == ["a"] * 3  # one query at least
    with pytest.raises(ValueError, match="dev must be at least 1, got 0"):
        task.limited(dev=0)


@pytest.mark.parametrize("max_length", [128, 40])
def test_extraction_finds_the_span_it_was_given(tokenizer, max_length):
    head = heads.Extraction(tokenizer, (), max_length)
    context = "the cat sat on the mat in Paris and Anna runs on the mat"
    examples = [
        Question("1", "a dog", context, (("in Paris", context.index("in Paris")),)),
        Question("2", "a cat", context, (("the cat", 0), ("mat", 19))),
        Question("3", "a cat", context, (("mat", len(context) - 3),)),
    ]
    features = head.features(examples, training=True)
    several = max_length == 40
    assert (len(features) > len(examples)) == several
    length = max(len(f["input_ids"]) for f in features)
    starts, ends = np.zeros((2, len(features), length))
    for row, feature in enumerate(features):
        if feature["end_positions"]:
            starts[row, feature["start_positions"]] = ends[row, feature["end_positions"]] = 9
    assert any(f["end_positions"] == 0 for f in features) == several  # windows without the answer point at <s>
    assert head.score(examples, features, (starts, ends), "en") == 100.0
    assert head.score(examples, features, (starts * 0, ends * 0), "en") < 50.0


@pytest.mark.parametrize(("prediction", "truth", "language", "expected"), [
    ("the cat!", "A CAT", "en", 1.0),
    ("the cat", "Cat sat", "en", 2 / 3),
    ("", "cat", "en", 0.0),
    ("the", "the", "en", 0.0),  # both are empty without articles: nothing is in common
    ("", "", "en", 0.0),
    ("der Hund", "Hund", "de", 1.0), ("der Hund", "Hund", "en", 2 / 3),
    ("la casa", "casa", "es", 1.0), ("cái nhà", "nhà", "vi", 1.0), ("البيت", "بيت", "ar", 1.0),
    ("我爱你", "爱你。", "zh", 0.8), ("的 cat", "cat", "zh", 2 / 3),
    ("$5 + 3`", "5 3", "hi", 1.0), ("a~b", "ab", "fr", 1.0),  # ASCII's symbols are punctuation
    ("5 €", "5", "hi", 2 / 3), ("5 ÷", "5 ×", "hi", 0.5),  # other symbols are words
    ("«x»", "x", "hi", 1.0), ("दिल्ली।", "दिल्ली", "hi", 1.0),
])  # fmt: skip
def test_answer_f1_by_language(prediction, truth, language, expected):
    assert scores.answer_f1(prediction, truth, language) == pytest.approx(expected)


def test_blanks_at_an_answer_s_ends_are_no_part_of_it(tokenizer, tmp_path):
    write("mlqa", tmp_path)
    context = "the cat sat on the mat"
    answers = [{"text": " cat ", "answer_start": 3}]
    data = {"data": [{"paragraphs": [{"context": context, "qas": [{"id": "1", "question": "?", "answers": answers}]}]}]}
    (tmp_path / "MLQA/squad1.1/train-v1.1.json").write_text(json.dumps(data))
    (example,) = xglue.load("mlqa", tmp_path).train
    assert example.answers == (("cat", 4),)
    (feature,) = heads.Extraction(tokenizer, (), 64).features([example], training=True)
    span = feature["input_ids"][feature["start_positions"] : feature["end_positions"] + 1]
    assert tokenizer.decode(span).strip() == "cat"


# Texts from packages


@pytest.fixture(scope="module")
def intent_task():
    return intents.load()


def test_intents_are_split_by_template(intent_task):
    assert intent_task.languages[0] == "en" and set(intent_task.languages) == set(intents.LANGUAGES)
    texts = {e.text for e in intent_task.train}
    assert len(texts) > 1000 and len(intent_task.labels) > 20
    assert {e.label for e in intent_task.train} == set(intent_task.labels)
    templates = {split: set() for split in ("train", "dev", "test")}
    for intent, by_template in intents._sentences("en", 0).items():
        for template, samples in by_template.items():
            if intent in intent_task.labels:
                share = intents._share(template)
                templates["train" if share < 0.7 else "dev" if share < 0.8 else "test"] |= set(samples)
    assert texts == templates["train"]
    assert {e.text for e in intent_task.test["en"]} <= templates["test"]
    assert all(len(examples) >= 40 for examples in intent_task.test.values())


def test_intents_are_the_same_every_time(intent_task):
    assert intents._sentences("tr", 0) == intents._sentences("tr", 0)
    assert intents._sentences("tr", 0) != intents._sentences("tr", 1)


def test_intent_sentences_have_no_template_left(intent_task):
    texts = [e.text for part in (intent_task.train, *intent_task.test.values()) for e in part]
    assert all(text.strip() == text and text for text in texts)
    assert not [text for text in texts if set(text) & set("{}<>[]|")]


def _packed(arguments, **_):
    """What pip would download: every language's file says its language."""
    if arguments[0] == "download":
        folder = Path(arguments[arguments.index("--dest") + 1])
        with tarfile.open(folder / "bigbench-1.0.0.tar.gz", "w:gz") as archive:
            for language in multiemo.LANGUAGES:
                (folder / "one").write_text(language)
                archive.add(folder / "one", multiemo._MEMBER.format(language))


def test_two_processes_may_download_multiemo_at_once(tmp_path, monkeypatch):
    """Each moves whole files to their places: here a second one does all of it while the first writes a file."""
    write_bytes, begun = Path.write_bytes, []

    def write(self, data):
        write_bytes(self, data)
        if not begun:
            begun.append(self)
            multiemo._download(tmp_path)

    monkeypatch.setattr(multiemo, "_run_pip", _packed)
    monkeypatch.setattr(Path, "write_bytes", write)
    multiemo._download(tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {f"{language}.json": language for language in multiemo.LANGUAGES}


def test_a_download_that_fails_is_an_error_of_the_task(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("pip download failed")

    monkeypatch.setenv("GRADDROP_DATA", str(tmp_path))
    monkeypatch.setattr(multiemo, "_run_pip", fails)
    with pytest.raises(ValueError, match="pip download failed"):
        tasks.load("multiemo")


def test_multiemo_splits_by_row(tmp_path, monkeypatch):
    for name, value in (("PARALLEL_ROWS", 50), ("TRAIN", 20), ("DEV", 5), ("TEST", 10)):
        monkeypatch.setattr(multiemo, name, value)
    monkeypatch.setenv("GRADDROP_DATA", str(tmp_path))
    (tmp_path / "multiemo").mkdir()
    for language in multiemo.LANGUAGES:
        kinds = ("positive", "negative")
        examples = [
            {"input": f"{i}", "target_scores": {kind: int(kind == kinds[i % 2]) for kind in kinds}} for i in range(60)
        ]
        (tmp_path / "multiemo" / f"{language}.json").write_text(json.dumps({"examples": examples}))
    task = multiemo.load()
    assert task.labels == ("negative", "positive")
    rows = {"train": [e.text for e in task.train], "dev": [e.text for e in task.dev["en"]]}
    rows["test"] = [e.text for e in task.test["en"]]
    assert {split: len(texts) for split, texts in rows.items()} == {"train": 20, "dev": 5, "test": 10}
    assert len(set().union(*rows.values())) == 35 and max(map(int, sum(rows.values(), []))) < 50
    for language in multiemo.LANGUAGES:
        assert [e.text for e in task.test[language]] == rows["test"]
    assert all(e.label == ("positive", "negative")[int(e.text) % 2] for e in task.train)
