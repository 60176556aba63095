"""Tensor shapes that optimizer steps are timed on."""

import math
from functools import cache

Shape = tuple[int, ...]


def shapes(name: str, elements: int | None) -> list[Shape]:
    """The shapes of population ``name``, in the model's order; the first of them that hold ``elements`` in all.

    Args:
        name: a key of POPULATIONS.
        elements: leave out tensors once this many elements are reached; one that would pass it is cut in its first
            dimension. None: all.

    Raises:
        ValueError: if there is no such population.
    """
    if name not in POPULATIONS:
        raise ValueError(f"population must be one of {', '.join(POPULATIONS)}, got {name!r}")
    every = POPULATIONS[name]()
    if elements is None:
        return every
    # the encoder first: the embeddings are half the model and one tensor
    chosen, left = [], elements
    for shape in sorted(every, key=lambda s: math.prod(s) > 100_000_000):
        numel = math.prod(shape)
        if numel > left:
            shape = (left // math.prod(shape[1:]), *shape[1:])
        if math.prod(shape) > 0:
            chosen.append(shape)
            left -= math.prod(shape)
    return chosen


@cache
def _xlm_roberta(width: int, layers: int, heads: int) -> list[Shape]:
    """The parameters of XLM-R for sequence classification, built without memory for them."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = XLMRobertaConfig(
        vocab_size=250_002,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    with torch.device("meta"):
        model = XLMRobertaForSequenceClassification(config)
    return [tuple(p.shape) for p in model.parameters()]


def _llama_7b() -> list[Shape]:
    """Llama 7B's parameters: 32 layers of width 4096 with untied embeddings."""
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    return [*layer * 32, (4096,), (32000, 4096), (32000, 4096)]


POPULATIONS = {
    "xlmr-large": lambda: _xlm_roberta(1024, 24, 16),
    "xlmr-base": lambda: _xlm_roberta(768, 12, 12),
    "llama-7b": _llama_7b,
    "small": lambda: [(1000,)] * 1000,
    "tiny": lambda: [(1000,)],
    "huge": lambda: [(256 << 20,)],
}
