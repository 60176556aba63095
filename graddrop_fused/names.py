"""From names to stream ids: what makes a parameter's masks its own, whatever wraps or shards the model."""

from collections.abc import Iterable
from hashlib import blake2b

ID_BITS = 52

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def canonical_name(name: str) -> str:
    """``name`` without the components that torch.compile, FSDP, activation checkpointing and DDP put into it.

    DDP's ``module`` goes only where it leads: a submodule may well be called that.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def numbered_block(name: str) -> str | None:
    """The name of the block that a parameter stands in, up to its first number: encoder.layer.3; None without one."""
    path = canonical_name(name).split(".")
    end = next((i for i, part in enumerate(path) if part.isdigit()), None)
    return None if end is None else ".".join(path[: end + 1])


def stream_id(name: str) -> int:
    """The id of a parameter or layer in the mask stream: 52 bits of BLAKE2b of its canonical name in UTF-8."""
    digest = blake2b(canonical_name(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**ID_BITS


def check_distinct(what: str, named_ids: Iterable[tuple[str, int]]) -> None:
    """Raises ValueError naming both owners if two of ``named_ids`` share an id: their masks would be the same."""
    owners: dict[int, str] = {}
    for name, number in named_ids:
        if number in owners:
            canonical = canonical_name(name)
            why = f"have the same stream id {number:#x}"
            if canonical == canonical_name(owners[number]):
                why = f"are both called {canonical!r} without their wrappers"
            raise ValueError(
                f"{what} {owners[number]!r} and {name!r} {why}, so they would get the same masks; rename one of them"
            )
        owners[number] = name
