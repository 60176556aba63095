"""Tiny XGLUE folders in the exact formats, and a tiny random model that reads them."""

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, XLMRobertaTokenizer

from benchmarks.crosslingual import xglue

WORDS = "the a cat dog sat on mat Paris Anna runs 3 , . das Haus est chat 我 爱 你 в доме".split()
ROWS = {"train": 12, "dev": 4, "test": 5}


def sentence(i: int, length: int = 5) -> str:
    return " ".join(WORDS[(3 * i + 5 * j) % len(WORDS)] for j in range(length))


def write(name: str, folder: Path) -> Path:
    """The files of XGLUE task ``name`` below ``folder``, which is returned."""
    source = xglue.TASKS[name]
    root = folder / name.upper()
    _write(root / source.train.format(l="en"), name, "train", ROWS["train"])
    for language in source.languages.split():
        for split in ("dev", "test"):
            _write(root / source.evaluate.format(l=language, s=split), name, split, ROWS[split])
    return folder


def _write(path: Path, name: str, split: str, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FORMATS[name](split, count), encoding="utf-8")


def _xnli(split, count):
    labels = ("contradictory" if split == "train" else "contradiction", "entailment", "neutral")
    rows = [f"{sentence(i)}\t{sentence(i + 1, 3)}\t{labels[i % 3]}" for i in range(count)]
    return "\n".join((["premise\thypo\tlabel"] if split == "train" else []) + rows) + "\n"


def _nc(split, count):
    labels = xglue.TASKS["nc"].labels
    return "".join(f"{sentence(i, 2)}\t{sentence(i, 9)}\t{labels[i % 10]}\n" for i in range(count))


def _ner(split, count):
    one = "Anna B-PER\nruns O\non O\nParis B-LOC\nмат I-LOC\n. O\n"
    two = "das O\nHaus B-ORG\n, O\nest B-MISC\n"
    return "-DOCSTART- O\n\n" + "\n".join((one, two)[i % 2] for i in range(count)) + "\n"


def _pos(split, count):
    return "\n".join("the DET\ncat NOUN\nsat VERB\n" + ("3 NUM\n" if i % 2 else ". PUNCT\n") for i in range(count))


def _pawsx(split, count):
    rows = [f"{i + 1}\t{sentence(i)}\t{sentence(i, 4)}\t{i % 2}" for i in range(count)]
    return "\n".join(["id\tsentence1\tsentence2\tlabel", *rows]) + "\n"


def _qam(split, count):
    return "".join(f"{sentence(i, 3)}\t{sentence(i, 12)}\t{i % 2}\n" for i in range(count))


def _qadsm(split, count):
    labels = ("Good", "Bad")
    return "".join(f'{sentence(i, 2)}\t"{sentence(i, 3)}\t{sentence(i)}\t{labels[i % 2]}\n' for i in range(count))


def _wpr(split, count):
    # three documents of a query each; the last query may have one
    return "".join(f"{sentence(i // 3, 2)}\t{sentence(i, 3)}\t{sentence(i)}\t{i % 5}\n" for i in range(count))


def _mlqa(split, count):
    paragraphs = []
    for i in range(count):
        context = sentence(i, 40)
        answer = " ".join(context.split()[7:9])
        question = {"id": f"{split}-{i}", "question": sentence(i + 1, 4),
                    "answers": [{"text": answer, "answer_start": context.index(answer)}]}  # fmt: skip
        paragraphs.append({"context": context, "qas": [question]})
    return json.dumps(
        {"version": 1.0, "data": [{"title": "t", "paragraphs": paragraphs}]}, ensure_ascii=False, indent=1
    )


FORMATS = {"xnli": _xnli, "nc": _nc, "ner": _ner, "pos": _pos, "pawsx": _pawsx, "qam": _qam, "qadsm": _qadsm,
           "wpr": _wpr, "mlqa": _mlqa}  # fmt: skip


def write_model(folder: Path) -> Path:
    """A random two-layer BERT with a tokenizer that cuts words into letters, saved as transformers saves models."""
    letters = sorted({letter for word in WORDS for letter in word} | set("абвгдежзиклмнопрстABCDEFxyz0123456789\"'"))
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -4.0) for letter in letters] + [("▁the", -3.0), ("▁cat", -3.0), ("<mask>", 0.0)]
    tokenizer = XLMRobertaTokenizer(vocab=pieces, model_max_length=128)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
