"""Cases whose tensors are longer than a pass of the GPU kernels, so that every kind of pass sees every kind of mask."""

from dataclasses import replace

from parity import CASES, Case, Spec

from graddrop_fused.contract import Effect, Mask, Shard

_NAMES = ("kinds-", "dtypes-")  # of all effects, rules and combinations of dtypes, with all kinds of masks


def several_passes(chunk: int, one_pass: int) -> list[Case]:
    """CASES with all kinds of masks on tensors of a chunk, a pass and a tail; then places where tiles do not fit.

    ``chunk``: elements of a program. ``one_pass``: of a wide pass, of 4-byte dtypes.
    """
    elements = chunk + one_pass + 77
    long = [enlarged(case, elements) for case in CASES if case.name.startswith(_NAMES)]
    block = next(b for b in (640, 384, 128) if b < one_pass)
    places = [
        Spec((elements,), shard=Shard((elements,), (1,), 128 * 5)),
        Spec((elements,), shard=Shard((elements,), (1,), 2**32 - 129)),
        Spec((elements,), Mask.GAUSSIAN, shard=Shard((elements,), (1,), 77)),
        Spec((elements,), Mask.PACKED, effect=Effect.FREEZE, shard=Shard((elements,), (1,), 33)),
        Spec((elements,), Mask.BLOCK, block=block, effect=Effect.FREEZE, shard=Shard((elements,), (1,), 2**40)),
        Spec((elements,), Mask.BLOCK, block=block + 1, effect=Effect.FREEZE),
        Spec((elements,), Mask.BLOCK, block=2**45, effect=Effect.UPDATE, shard=Shard((elements,), (1,), 2**43 - 500)),
        Spec((elements,), offset=1, grad_offset=2),
        Spec((elements,), grad_expanded=True),
    ]
    strided = [
        Spec((97, elements // 97), mask, effect=effect, order=(1, 0), grad_order=order, block=block - 1)
        for mask, effect, order in zip(Mask, list(Effect) * 3, [(1, 0), None] * 4, strict=False)
    ]
    return [*long, Case("places-several-passes", tuple(places)), Case("strided-several-passes", tuple(strided))]


def enlarged(case: Case, elements: int) -> Case:
    """The case with every tensor of that many elements, in one dimension."""
    specs = tuple(replace(spec, shape=(elements,), order=None, grad_order=None) for spec in case.specs)
    return replace(case, name=f"{case.name}-several-passes", specs=specs, steps=1)
