"""Models: the embedded encoder, or any transformers model by hub name or local folder."""

from contextlib import contextmanager

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from . import embedded
from .task import Task

EMBEDDED = embedded.NAME


def load(name: str, task: Task, auto_model) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model ``name`` with a new head for ``task``, and its tokenizer.

    The head takes torch's global generator: seed it before.

    Raises:
        ValueError: if transformers finds no such model, or the embedded model's package is missing.
    """
    labels = {"num_labels": len(task.labels)} if task.labels else {}
    if name != EMBEDDED:
        try:
            with _quiet():
                return auto_model.from_pretrained(name, **labels), AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise ValueError(f"model {name!r} cannot be loaded: {first}") from None
    try:
        config, state, tokenizer = _embedded(task)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    for key, value in labels.items():
        setattr(config, key, value)
    with _quiet():
        model = auto_model.from_config(config)
    missing, unexpected = model.base_model.load_state_dict(state, strict=False)
    if unexpected or any(not key.startswith("pooler.") for key in missing):
        raise ValueError(f"embedded weights do not fit: missing {missing}, unexpected {unexpected}")
    return model, tokenizer


def check_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raises ValueError if the model has fewer positions than ``max_length`` tokens need."""
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    if "roberta" in model.config.model_type or "camembert" in model.config.model_type:
        positions -= model.config.pad_token_id + 1  # they number positions behind the padding's
    positions = min(positions, tokenizer.model_max_length)
    if max_length > positions:
        raise ValueError(f"max_length must be at most the model's {positions} positions, got {max_length}")


@contextmanager
def _quiet():
    """Without transformers' tables of weights: that the head is new is what is wanted, in every run."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


_read: dict[int, tuple] = {}  # the last texts': several methods run on one task in turn


def _embedded(task: Task) -> tuple:
    texts = task.texts()
    key = hash(tuple(texts))
    if key not in _read:
        _read.clear()
        _read[key] = embedded.load(texts)
    return _read[key]
