"""What find_layers makes of every model class with a task head in the installed transformers: docs/layers/sweep.csv.

    python -m benchmarks.layer_sweep [--only REGEX] [--out docs/layers/sweep.csv]

Each class is built on the meta device, so at the default widths of its config and without weights, with 12 blocks where
its config takes that. Its layers are then compared with what forward hooks see of a forward pass, as far as that gets
without data.
"""

import argparse
import collections
import csv
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from graddrop_fused.layers import find_layers
from graddrop_fused.stacks import Walk
from graddrop_fused.targets import attention_projections

TASKS = (
    "ForSequenceClassification|ForTokenClassification|ForQuestionAnswering|ForImageClassification"
    "|ForAudioClassification|ForCausalLM|LMHeadModel|ForConditionalGeneration|ForCTC"
)
# The first of these that a class builds with: fewer blocks to trace, where its config calls them so; then what some
# configs leave out that their models need.
FEWER = {"num_hidden_layers": 12}
OPTIONS = (FEWER, {}, {"vocab_size": 64}, {"head_dim": 64}, {"num_key_value_heads": 8}, {"num_key_value_heads": 16})
COLUMNS = ("class", "blocks", "stacks", "embeddings", "between", "head", "attention", "query", "trace")


def classes(only: str = "") -> list[type]:
    """The model classes of all tasks, by name."""
    names = [n for n in dir(transformers) if re.search(f"({TASKS})$", n) and not n.startswith(("Auto", "DataCollator"))]
    return [getattr(transformers, name) for name in names if re.search(only, name)]


def build(cls: type, **options) -> nn.Module:
    """A model of the default config on the meta device. Raises what the class raises."""
    error: Exception | None = None
    for more in OPTIONS:
        try:
            with torch.device("meta"):
                model = cls(cls.config_class(**{**more, **options}))
            return model.eval()
        except Exception as e:  # noqa: BLE001 - whatever a class that cannot be built raises
            error = error or e
    raise error


def row(cls: type) -> dict[str, str]:
    """The table's row of one class."""
    try:
        model = build(cls)
    except Exception as e:  # noqa: BLE001
        return {"class": cls.__name__, "trace": f"not built: {_brief(e)}"}
    try:
        layers = find_layers(model)
    except ValueError as e:
        return {"class": cls.__name__, "trace": f"find_layers: {e}"}
    found, parts = _where(layers), Walk.through(model).parts
    stacks = collections.Counter(part.names[0].rpartition(".")[0] for part in parts if part.is_block)
    others = {part.names[0]: found(part.names[0]) for part in parts if not part.is_block}
    in_blocks = [n for layer in layers if layer.startswith("layer.") for n in layers[layer]]
    keys = attention_projections(model, in_blocks, "attention")
    query = attention_projections(model, in_blocks, "attention+query") - keys
    return {
        "class": cls.__name__,
        "blocks": str(len([layer for layer in layers if layer.startswith("layer.")])),
        "stacks": "; ".join(f"{stack} {count}" for stack, count in stacks.items()),
        "embeddings": " ".join(name for name, layer in others.items() if layer == "embeddings"),
        "between": "; ".join(f"{name} in {layer}" for name, layer in others.items() if "layer." in layer),
        "head": " ".join(name for name, layer in others.items() if layer == "head"),
        "attention": _projections(keys),
        "query": _projections(query),
        "trace": compare(model, layers),
    }


def _where(layers: dict[str, dict]) -> Callable[[str], str]:
    """Says in which layer a module, or most of it, is; "tied" if all its parameters are elsewhere."""
    layer_of = {name: layer for layer, params in layers.items() for name in params}

    def found(module: str) -> str:
        counts = collections.Counter(at for n, at in layer_of.items() if f"{n}.".startswith(f"{module}."))
        return max(counts, key=counts.__getitem__, default="tied")

    return found


def _projections(names) -> str:
    """Their kinds: names without what comes before the last number."""
    tails = (re.sub(r"[._](weight|bias)$", "", name) for name in names)
    return " ".join(sorted({".".join(re.split(r"(?:^|\.)\d+\.", tail)[-1].split(".")[-3:]) for tail in tails}))


# The forward pass, as hooks see it


class _Pretend(TorchFunctionMode):
    """Answers what asks for a value, which meta tensors lack: zero, and yes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__):
            return 0
        if func in (torch.Tensor.__bool__, torch.Tensor.__contains__, torch.equal, torch.allclose):
            return True
        if func is torch.Tensor.tolist:
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device="cpu").tolist()
        return func(*args, **(kwargs or {}))


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs of a kind that most models of a modality take."""
    params = inspect.signature(model.forward).parameters
    size = _setting(model.config, "image_size", "img_size") or 224
    mels = _setting(model.config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim") or 80
    frames = 3000 if "Whisper" in type(model).__name__ else 400
    features = (1, mels, frames) if "Whisper" in type(model).__name__ else (1, frames, mels)
    shapes = {
        "input_ids": (1, 16),
        "decoder_input_ids": (1, 16),
        "bbox": (1, 16, 4),
        "pixel_values": (1, _setting(model.config, "num_channels", "in_channels") or 3, size, size),
        "input_values": (1, 1024, 128) if "AST" in type(model).__name__ else (1, 16000),
        "input_features": features,
    }
    floats = ("pixel_values", "input_values", "input_features")
    return {
        name: torch.zeros(shape, dtype=torch.float32 if name in floats else torch.long, device="meta")
        for name, shape in shapes.items()
        if name in params
    }


def _setting(config, *names: str) -> int | None:
    configs = [config]
    while configs:
        config = configs.pop(0)
        for name in names:
            value = getattr(config, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int):
                return value
        configs += [v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig)]
    return None


def trace(model: nn.Module) -> tuple[dict[str, int], str]:
    """(when each module with parameters was first called, why the pass ended early or "")."""
    times: dict[str, int] = {}
    hooks = [
        module.register_forward_pre_hook(functools.partial(_note, times, name))
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None
    ]
    problem = ""
    try:
        model.set_experts_implementation("batched_mm")
    except Exception:  # noqa: BLE001, S110 - a model without experts
        pass
    try:
        with torch.no_grad(), _Pretend():
            model(**inputs(model))
    except Exception as e:  # noqa: BLE001
        problem = _brief(e)
    for hook in hooks:
        hook.remove()
    return times, problem


def _note(times: dict[str, int], name: str, *_) -> None:
    times.setdefault(name, len(times))


def compare(model: nn.Module, layers: dict[str, dict]) -> str:
    """Whether the forward pass runs the layers in their order, as far as it gets."""
    times, problem = trace(model)
    tied = _tied(model)
    called = {layer: _first_calls(params.keys() - tied, times) for layer, params in layers.items()}
    starts = {layer: min(t.values()) for layer, t in called.items() if t and layer.startswith("layer.")}
    order = list(starts.values())
    wrong = [layer for layer, before, now in zip([*starts][1:], order, order[1:], strict=False) if now < before]
    if starts and not wrong:
        late = [n for n, t in called.get("embeddings", {}).items() if t > min(order)]
        early = [n for n, t in called.get("head", {}).items() if t < max(order)]
        wrong = [f"{n} (embeddings) after layer.0" for n in late if "emb" not in n.lower() and not _is_table(model, n)]
        wrong += [f"{n} (head) before the last layer" for n in early]
    seen = len(starts) / max(1, len(layers.keys() - {"embeddings", "head"}))
    if not starts:
        return f"no trace: {problem}"
    reached = "all" if seen == 1 and not problem else f"{seen:.0%} of the blocks, then {problem or 'no more'}"
    return f"differs: {'; '.join(wrong[:4])}" if wrong else f"agrees: {reached}"


def _is_table(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Embedding)


def _tied(model: nn.Module) -> set[str]:
    """Parameters of several names: modules of several layers may own them."""
    names = collections.defaultdict(set)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param].add(name)
    return set().union(*(same for same in names.values() if len(same) > 1))


def _first_calls(params: Iterable[str], times: dict[str, int]) -> dict[str, int]:
    """When the modules that own these parameters were called, but for those with layers inside."""
    owners = {name.rpartition(".")[0] for name in params}
    inner = {name.rpartition(".")[0] for name in times}  # of modules that were called
    return {owner: times[owner] for owner in owners - inner if owner in times}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"


def main(argv: list[str] | None = None) -> None:
    """Write the table, and print how many rows say what."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="a regular expression of class names")
    parser.add_argument("--out", type=Path, default=Path("docs/layers/sweep.csv"))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    outcomes: collections.Counter[str] = collections.Counter()
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for cls in tqdm(classes(args.only), unit="class", file=sys.stderr, mininterval=2):
            found = row(cls)
            outcomes[found["trace"].split(":")[0]] += 1
            writer.writerow(found)
            file.flush()
    for outcome, count in outcomes.most_common():
        print(f"{count:4} {outcome}")
    print(f"{outcomes.total():4} classes of transformers {transformers.__version__}: {args.out}")


if __name__ == "__main__":
    main()
