"""What the compilers say of the Triton kernels: registers, spills, access widths, instructions per element.

    python -m benchmarks.gpu_report [--quick] [--targets sm_90 ...]
    python -m benchmarks.gpu_report --bounds tests/helpers/triton_bounds.json
    python -m benchmarks.gpu_report --bounds tests/helpers/triton_bounds.json --table docs/gpu.md

Compiler-derived predictions only: nothing here was timed on a GPU, and none is needed. Each variant is compiled ahead
of time for sm_80, sm_90, sm_100 and gfx942 with the options of a real launch. SASS comes from the disassembler in
Triton's wheel; for gfx942 the AMDGCN assembly says the same.

The model: one wide pass moves BYTES per element once between memory and SM. A limit is the share of the memory's
rate at which that resource alone would run: above 1 it is not the bottleneck. Branches inside a pass are all counted; a
loop inside it (counters of a mask drawn one at a time) by its trip count.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.assembly import Amd, Nvidia, PassShape, Report
from benchmarks.crosslingual import reports
from graddrop_fused import triton_backend
from graddrop_fused.contract import Effect, Mask
from graddrop_fused.rules import SGD, AdamW, Lion, MaskOnly, Rule

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": (F32, F32, F32), "bf16, fp32 state": (BF16, BF16, F32), "bf16": (BF16, BF16, BF16)}
MASKS = {
    "none": [Mask.KEEP],
    "element": [Mask.ELEMENT],
    "element or none": [Mask.ELEMENT, Mask.KEEP, Mask.DROP],
    "block": [Mask.BLOCK],
    "packed": [Mask.PACKED],
    "layer": [Mask.LAYER],
    "gaussian": [Mask.GAUSSIAN],
    "all": list(Mask),
}
RULES = {
    "adamw": AdamW(),
    "amsgrad": AdamW(amsgrad=True),
    "sgd": SGD(),
    "momentum": SGD(momentum=True),
    "lion": Lion(),
    "mask": MaskOnly(),
}
EFFECTS = {"gradient": 1 << Effect.GRADIENT, "freeze": 1 << Effect.FREEZE, "any effect": (1 << len(Effect)) - 1}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BEGIN, END = "<!-- what the compilers say: begin -->", "<!-- what the compilers say: end -->"


@dataclass(frozen=True)
class GPU:
    """Vendor figures: memory bytes per second, SMs, clock; per SM and clock: issue, int32, special-function lanes."""

    name: str
    bandwidth: float
    sms: int
    clock: float
    issue: int = 128
    integer: int = 64
    special: int = 16


GPUS = {
    "sm_80": GPU("A100", 2.0e12, 108, 1.41e9),
    "sm_90": GPU("H100", 3.0e12, 132, 1.755e9),
    "sm_100": GPU("B200", 8.0e12, 148, 1.85e9, integer=128),
}


@dataclass(frozen=True)
class Variant:
    """A compiled kernel: an update of ``rule``, or packing where ``rule`` is None."""

    mask: str
    dtypes: str = "fp32"
    rule: str | None = "adamw"
    effect: str = "gradient"
    dims: int = 0  # of the strided tensors in the batch; 0: there are none
    own: bool = False  # blocks have factors of their own counts of steps
    rounding: str = "nearest"

    @property
    def kinds(self) -> int:
        return sum(1 << kind for kind in MASKS[self.mask])

    @property
    def states(self) -> int:
        return len(RULES[self.rule].states)

    @property
    def bytes_per_element(self) -> float:
        if self.rule is None:
            return 1 / 8
        param, grad, state = (dtype.itemsize for dtype in DTYPES[self.dtypes])
        read = 0 if self.rule == "mask" else param
        return read + param + grad + 2 * self.states * state + (1 / 8 if self.mask == "packed" else 0)

    def sizes(self, warp_size: int) -> dict[str, int]:
        if self.rule is None:
            return triton_backend.pack_sizes(warp_size)
        return triton_backend.sizes(DTYPES[self.dtypes], warp_size)

    def shapes(self, warp_size: int) -> list[PassShape]:
        """The passes to find in the assembly: elements are those of a thread."""
        sizes = self.sizes(warp_size)
        if self.rule is None:
            return [PassShape("wide", 128, counters=16)]
        shapes = [PassShape("wide", 4 * sizes["VECTOR"], counters=sizes["VECTOR"] // 2)]
        # of blocks, two counters: those of 96 elements and more, by which draw.narrow_blocks draws
        counters = 2 if Mask.BLOCK in MASKS[self.mask] else 4
        shapes.append(PassShape("narrow", 4, stores=4 * (1 + self.states), counters=counters))
        if self.dims:
            each = sizes["STRIDED"] // (sizes["num_warps"] * warp_size)
            shapes.append(PassShape("strided", each, stores=each * (1 + self.states)))
        return shapes

    def __str__(self) -> str:
        if self.rule is None:
            return f"pack: {self.mask}"
        parts = [self.mask, self.dtypes] + [self.effect] * (self.effect != "gradient")
        parts += ["own counts"] * self.own
        parts += [f"{self.dims} dimensions"] * (self.dims > 0)
        parts += ["stochastic rounding"] * (self.rounding == "stochastic")
        return ("" if self.rule == "adamw" else f"{self.rule}: ") + ", ".join(parts)


VARIANTS = [
    *(Variant(mask, dtypes) for mask in ("none", "element", "packed", "gaussian") for dtypes in DTYPES),
    *(Variant("block", dtypes, effect="freeze") for dtypes in DTYPES),
    *(Variant("block", dtypes, effect="freeze", own=True) for dtypes in ("fp32", "bf16")),
    *(Variant("element", dtypes, effect="any effect") for dtypes in DTYPES),
    Variant("element or none"),
    Variant("layer"),
    *(Variant("all", dtypes, effect="any effect") for dtypes in ("fp32", "bf16")),
    *(Variant("element", rule=rule) for rule in RULES if rule != "adamw"),
    *(Variant("element", "bf16", rule=rule) for rule in ("amsgrad", "lion")),
    *(Variant(mask, dims=2) for mask in ("none", "element")),
    Variant("element", "bf16", dims=3),
    *(Variant("element", dtypes, rounding="stochastic") for dtypes in ("bf16, fp32 state", "bf16")),
    Variant("none", "bf16", rounding="stochastic"),
    Variant("element", "bf16", dims=2, rounding="stochastic"),
    Variant("block", "bf16", effect="freeze", dims=2, own=True, rounding="stochastic"),
    Variant("element", rule=None),
]


def compile_variant(variant: Variant, target: str):
    """Triton's compiled kernel, with a real launch's signature and options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graddrop_fused.kernels.triton import kernels

    amd = target.startswith("gfx")
    kernel = kernels.pack_kernel if variant.rule is None else kernels.update_kernel
    sizes = variant.sizes(64 if amd else 32)
    given = sizes | {"KINDS": variant.kinds, "DIMS": variant.dims, "WIDE": False}
    if variant.rule is not None:
        rule: Rule = RULES[variant.rule]
        given |= triton_backend.rule_constants(rule) | triton_backend.dtype_constants(DTYPES[variant.dtypes])
        given |= {"grad_scale": None, "found_inf": None, "EFFECTS": EFFECTS[variant.effect]}
        given |= {"rounding": None} if variant.rounding == "nearest" else {}
        given["OWN"] = variant.own
    types = {
        "chunks": "*i64",
        "layout": "*i64",
        "integers": "*i64",
        "reals": "*fp64",
        "rounding": "*i64",
        "seed": "u64",
    }
    types = {name: type for name, type in types.items() if name not in given}
    return triton.compile(
        ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in kernel.arg_names},
            constexprs={name: value for name, value in given.items() if name in kernel.arg_names},
        ),
        target=GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32),
        options={"num_warps": sizes["num_warps"]} | triton_backend.OPTIONS,
    )


def examine(variant: Variant, target: str) -> Report:
    compiled = compile_variant(variant, target)
    if target.startswith("gfx"):
        return Amd.read(compiled.asm["amdgcn"], variant.shapes(64))
    return Nvidia.read(compiled.asm["cubin"], variant.shapes(32))


def limits(variant: Variant, report: Report, gpu: GPU) -> dict[str, float]:
    """Each resource's own limit, as a share of the memory roofline."""
    memory = gpu.bandwidth / variant.bytes_per_element  # elements per second
    per_second = gpu.sms * gpu.clock
    wide = report.passes["wide"]
    use = wide.per_element
    needs = {
        "issue": (gpu.issue, wide.instructions),
        "integer": (gpu.integer, use.get("INT", 0) + use.get("IMAD", 0)),
        "special": (gpu.special, use.get("SFU", 0)),
    }
    return {"memory": 1.0} | {name: rate * per_second / need / memory for name, (rate, need) in needs.items() if need}


COLUMNS = "variant | target | B/elem | widths | regs | spills | stack | shared | wide | narrow | strided | by pipe"


def row(variant: Variant, target: str) -> str:
    """A row of the report's table: COLUMNS and limits."""
    r = examine(variant, target)
    wide = r.passes["wide"]
    widths = ", ".join(f"{n} x {w} B" for w, n in sorted(wide.widths.items()))
    spills = f"{r.spills} ({r.in_lanes} scalars in lanes)" if r.in_lanes else str(r.spills)
    instructions = [f"{r.passes[p].instructions:.1f}" if p in r.passes else "-" for p in ("wide", "narrow", "strided")]
    pipes = ", ".join(f"{name} {count:.1f}" for name, count in sorted(wide.per_element.items()))
    gpu = GPUS.get(target)
    shares = limits(variant, r, gpu) if gpu else {}
    said = f"{gpu.name}: " + ", ".join(f"{k} {v:.1f}x" for k, v in shares.items() if k != "memory") if gpu else "-"
    first = [str(variant), target, f"{variant.bytes_per_element:g}", widths, r.registers, spills, r.stack, r.shared]
    return " | ".join(map(str, [*first, *instructions, pipes, said]))


def numbers(report: Report) -> list[float]:
    """Registers, and instructions per element of the wide, narrow and strided pass, of those that there are."""
    passes = (report.passes[name] for name in ("wide", "narrow", "strided") if name in report.passes)
    return [report.registers, *(round(p.instructions, 1) for p in passes)]


def write_bounds(path: Path) -> None:
    """Measures every variant on sm_90 and puts its numbers into the JSON file, under the version of Triton."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    for variant in VARIANTS:
        report = examine(variant, "sm_90")
        print(f"{variant}: {numbers(report)}, {report.spills} spills", flush=True)
        bounds = json.loads(path.read_text())  # read anew: another version's run may have written
        bounds[version] = bounds.get(version, {}) | {str(variant): numbers(report)}
        bounds = {v: {name: of[name] for name in map(str, VARIANTS) if name in of} for v, of in sorted(bounds.items())}
        tables = (
            f' "{v}": {{\n' + ",\n".join(f"  {json.dumps(k)}: {json.dumps(n)}" for k, n in of.items()) + "\n }"
            for v, of in bounds.items()
        )
        path.write_text("{\n" + ",\n".join(tables) + "\n}\n")


def bounds_table(bounds: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: what the JSON file says, a column for each version of Triton."""
    lines = [["variant", "B/elem", *bounds], ["---"] * (2 + len(bounds))]
    for variant in VARIANTS:
        found = [of.get(str(variant)) for of in bounds.values()]
        cells = [f"{n[0]}: {' / '.join(f'{x:.1f}' for x in n[1:])}" if n else "not measured" for n in found]
        lines.append([str(variant), f"{variant.bytes_per_element:g}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Static report of the Triton kernels: predictions, no GPU timing.")
    parser.add_argument("--quick", action="store_true", help="AdamW with element masks only")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--bounds", type=Path, metavar="FILE", help="write what the tests compare with, and stop")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="only write what --bounds has into this Markdown file"
    )
    options = parser.parse_args()
    if options.table and not options.bounds:
        parser.error("--table writes what --bounds FILE has: give both")
    if options.table:
        reports.write_between(options.table, BEGIN, END, bounds_table(json.loads(options.bounds.read_text())))
        return
    if options.bounds:
        write_bounds(options.bounds)
        return
    import triton

    print(f"Compiler-derived predictions (Triton {triton.__version__}); no GPU was timed.\n")
    print(f"| {COLUMNS} | limits |\n|{'---|' * 13}")
    for variant in VARIANTS:
        if not options.quick or str(variant) == f"element, {variant.dtypes}":
            for target in options.targets:
                print(f"| {row(variant, target)} |", flush=True)


if __name__ == "__main__":
    main()
