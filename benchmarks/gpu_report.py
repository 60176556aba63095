"""What the compilers say of the Triton kernels: registers, spills, access widths, instructions per element.

    python -m benchmarks.gpu_report [--quick]

Compiler-derived predictions only: nothing here was timed on a GPU, and none is needed. Each variant is compiled ahead
of time for sm_80, sm_90, sm_100 and gfx942 with the options of a real launch. SASS comes from the disassembler in
Triton's wheel; for gfx942 the AMDGCN assembly says the same.

The model: one pass of the full-chunk loop moves BYTES per element once between memory and SM. A limit is the share of
the memory's rate at which that resource alone would run: above 1 it is not the bottleneck. Branches inside a pass are
all counted; a loop inside it (lanes of a mask drawn two at a time) by its trip count.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from graddrop_fused import triton_backend
from graddrop_fused.contract import Effect, Mask

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": (F32, F32, F32), "bf16, fp32 state": (BF16, BF16, F32), "bf16": (BF16, BF16, BF16)}
MASKS = {
    "none": [Mask.KEEP],
    "element": [Mask.ELEMENT],
    "block": [Mask.BLOCK],
    "packed": [Mask.PACKED],
    "layer": [Mask.LAYER],
    "gaussian": [Mask.GAUSSIAN],
    "all": list(Mask),
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


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
    mask: str
    dtypes: str
    amsgrad: bool = False
    effects: int = 1 << Effect.GRADIENT
    kernel: str = "adamw"

    @property
    def kinds(self) -> int:
        return sum(1 << kind for kind in MASKS[self.mask])

    @property
    def bytes_per_element(self) -> float:
        param, grad, state = (dtype.itemsize for dtype in DTYPES[self.dtypes])
        if self.kernel == "pack":
            return 1 / 8
        if self.kernel == "mask_grads":
            return 2 * grad
        return 2 * param + grad + (6 if self.amsgrad else 4) * state + (1 / 8 if self.mask == "packed" else 0)

    def sizes(self, warp_size: int) -> dict[str, int]:
        if self.kernel == "pack":
            return triton_backend.pack_shape(warp_size)
        dtypes = DTYPES[self.dtypes]
        return triton_backend.shape(dtypes if self.kernel == "adamw" else dtypes[1:2], warp_size)

    @property
    def elements_per_thread(self) -> int:
        """Of a pass."""
        return 128 if self.kernel == "pack" else 4 * self.sizes(32)["VECTOR"]

    def __str__(self) -> str:
        effects = "" if self.effects == 1 << Effect.GRADIENT else ", freeze" if self.effects == 2 else ", any effect"
        dtypes = "" if self.kernel == "pack" else f", {self.dtypes}"
        name = "" if self.kernel == "adamw" else f"{self.kernel}: "
        return f"{name}{self.mask}{dtypes}{', amsgrad' if self.amsgrad else ''}{effects}"


FREEZE, ANY = 1 << Effect.FREEZE, (1 << len(Effect)) - 1
VARIANTS = [
    *(Variant(m, d, effects=FREEZE if m == "block" else 1) for m in MASKS if m != "all" for d in DTYPES),
    *(Variant("element", d, amsgrad=True) for d in DTYPES),
    *(Variant("element", d, effects=ANY) for d in DTYPES),
    *(Variant("all", d, effects=ANY) for d in DTYPES),
    *(Variant("element", d, kernel="mask_grads") for d in ("fp32", "bf16")),
    Variant("element", "fp32", kernel="pack"),
]


@dataclass(frozen=True)
class Report:
    registers: int
    spills: int  # loads and stores of local memory
    stack: int  # bytes
    shared: int  # bytes
    widths: Counter  # bytes -> accesses of the full-chunk loop
    per_element: dict[str, float]  # instructions by pipe
    in_lanes: int = 0  # gfx942: scalars kept in lanes of a vector register, for want of scalar registers


def compile_variant(variant: Variant, target: str):
    """Triton's compiled kernel, with a real launch's signature and options."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graddrop_fused.kernels.triton import kernels

    amd = target.startswith("gfx")
    kernel = getattr(kernels, f"{variant.kernel}_kernel")
    dtypes = zip(("PARAM_DTYPE", "GRAD_DTYPE", "STATE_DTYPE"), DTYPES[variant.dtypes], strict=True)
    sizes = variant.sizes(64 if amd else 32)
    given = {name: _tl(tl, dtype) for name, dtype in dtypes} | sizes
    given |= {"grad_scale": None, "found_inf": None, "KINDS": variant.kinds, "EFFECTS": variant.effects}
    given["AMSGRAD"] = variant.amsgrad
    types = {"chunks": "*i64", "layout": "*i64", "integers": "*i64", "reals": "*fp64", "seed": "u64"}
    return triton.compile(
        ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in kernel.arg_names},
            constexprs={name: value for name, value in given.items() if name in kernel.arg_names},
        ),
        target=GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32),
        options={"num_warps": sizes["num_warps"]} | triton_backend.OPTIONS,
    )


def _tl(tl, dtype: torch.dtype):
    return getattr(tl, str(dtype).removeprefix("torch."))


def examine(variant: Variant, target: str) -> Report:
    compiled = compile_variant(variant, target)
    if target.startswith("gfx"):
        return _amdgcn(compiled.asm["amdgcn"], variant.elements_per_thread)
    return _sass(compiled.asm["cubin"], variant.elements_per_thread)


def _amdgcn(assembly: str, elements: int) -> Report:
    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    lines = [line.split(";")[0].strip() for line in assembly.splitlines()]
    lines = [line for line in lines if re.match(r"\.LBB\w+:$|[a-z]+_\w+(\s|$)", line)]
    loop = full_chunk_loop(lines, r"(global|buffer)_store_dwordx[24]\b", AMD_BRANCH)
    weights = loop_weights(loop, elements, AMD_BRANCH, r"v_(mad_u64_u32|mul_hi_u32)\b")
    widths = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    found = re.findall(r"(?:global|buffer)_(?:load|store)_(dwordx?[234]?|u?short|u?byte)\b", "\n".join(loop))
    pipes: Counter = Counter()
    for line, weight in zip(loop, weights, strict=True):
        if not line.startswith(".L"):
            name = line.split()[0]
            pipes["VALU" if name.startswith("v_") else "SALU" if name.startswith("s_") else "memory"] += weight
    spills = sum(line.startswith("scratch_") for line in lines)
    stack, shared = number("private_segment_fixed_size"), number("group_segment_fixed_size")
    return Report(
        number("vgpr_count"),
        spills,
        stack,
        shared,
        Counter(widths.get(w, 2) for w in found),
        {name: count / elements for name, count in pipes.items()},
        in_lanes=number("sgpr_spill_count"),
    )


def _sass(cubin: bytes, elements: int) -> Report:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        listing = _run(tools / "nvdisasm", "-c", file.name)
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in listing.splitlines()]
    lines = [line for line in lines if line.startswith(".L_") or line.endswith(";")]
    loop = full_chunk_loop(lines, r"\bSTG\.E\.(128|64)\b", NVIDIA_BRANCH)
    weights = loop_weights(loop, elements, NVIDIA_BRANCH, r"IMAD\.(WIDE|HI)")
    names = [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].rstrip(";") for line in loop]
    pipes: Counter = Counter()
    for name, weight in zip(names, weights, strict=True):
        if not name.startswith(".L_"):
            pipes[pipe(name)] += weight
    local = [line for line in lines if re.search(r"\b(LDL|STL)\b", line)]
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    return Report(
        resources["REG"],
        len(local),
        resources["STACK"],
        resources["SHARED"],
        Counter(width(name) for name in names if name.startswith(("LDG", "STG"))),
        {name: count / elements for name, count in pipes.items()},
    )


def _run(*command) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


NVIDIA_BRANCH = r"BRA[.\w]*\s.*?`\((\.L_\w+)\)"
AMD_BRANCH = r"s_c?branch\w*\s+(\.LBB\w+)"


def full_chunk_loop(lines: list[str], wide_store: str, branch: str) -> list[str]:
    """The outermost backward branch around the first store that is as wide as a vector."""
    store = next(i for i, line in enumerate(lines) if re.search(wide_store, line))
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    spans = []
    for i, line in enumerate(lines):
        target = re.search(branch, line)
        if target and labels[target.group(1)] <= store <= i:
            spans.append((labels[target.group(1)], i))
    start, end = max(spans, key=lambda span: span[1] - span[0])
    return lines[start : end + 1]


def loop_weights(loop: list[str], elements: int, branch: str, multiply: str) -> list[float]:
    """How often a pass runs each line. A loop inside the loop draws: a counter takes some 20 wide multiplications and
    serves four of the pass's ``elements`` per thread."""
    labels = {line.rstrip(":"): i for i, line in enumerate(loop) if line.startswith(".L")}
    weights = [1.0] * len(loop)
    for i, line in enumerate(loop[:-1]):
        target = re.search(branch, line)
        if target and 0 < labels.get(target.group(1), len(loop)) < i:
            inside = range(labels[target.group(1)], i + 1)
            counters = round(sum(bool(re.search(multiply, loop[k])) for k in inside) / 20)
            for k in inside if counters else ():
                weights[k] = elements / 4 / counters
    return weights


def width(access: str) -> int:
    bits = re.search(r"\.(128|64|U16|S16|U8|S8)\b", access)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[bits.group(1)] if bits else 4


def pipe(name: str) -> str:
    base = name.split(".")[0]
    if base in {"FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "FCHK", "FMUL2", "FFMA2", "FADD2"}:
        return "FP32"
    if base == "IMAD":
        return "IMAD"
    if base == "MUFU" or base.startswith(("F2", "I2")):
        return "SFU"
    if base in {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL", "STL"}:
        return "LSU"
    integer = {"IADD3", "IADD", "VIADD", "ISETP", "LOP3", "SHF", "SEL", "LEA", "VIADDMNMX", "PRMT", "IABS", "ISCADD"}
    return "INT" if base in integer else "other"


def limits(variant: Variant, report: Report, gpu: GPU) -> dict[str, float]:
    """Each resource's own limit, as a share of the memory roofline."""
    memory = gpu.bandwidth / variant.bytes_per_element  # elements per second
    per_second = gpu.sms * gpu.clock
    use = report.per_element
    needs = {
        "issue": (gpu.issue, sum(use.values())),
        "integer": (gpu.integer, use.get("INT", 0) + use.get("IMAD", 0)),
        "special": (gpu.special, use.get("SFU", 0)),
    }
    return {"memory": 1.0} | {name: rate * per_second / need / memory for name, (rate, need) in needs.items() if need}


def main() -> None:
    parser = argparse.ArgumentParser(description="Static report of the Triton kernels: predictions, no GPU timing.")
    parser.add_argument("--quick", action="store_true", help="element masks only")
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    options = parser.parse_args()
    import triton

    print(f"Compiler-derived predictions (Triton {triton.__version__}); no GPU was timed.\n")
    print(
        "| variant | target | B/elem | widths | regs | spills | stack | shared | instructions/elem by pipe | limits |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        if options.quick and str(variant) != f"element, {variant.dtypes}":
            continue
        for target in options.targets:
            r = examine(variant, target)
            pipes = ", ".join(f"{name} {count:.1f}" for name, count in sorted(r.per_element.items()))
            total = f"{sum(r.per_element.values()):.1f}: {pipes}"
            spills = f"{r.spills} ({r.in_lanes} scalars in lanes)" if r.in_lanes else str(r.spills)
            gpu = GPUS.get(target)
            shares = limits(variant, r, gpu) if gpu else {}
            said = f"{gpu.name}: " + ", ".join(f"{k} {v:.1f}x" for k, v in shares.items()) if gpu else "-"
            widths = ", ".join(f"{n} x {w} B" for w, n in sorted(r.widths.items()))
            print(
                f"| {variant} | {target} | {variant.bytes_per_element:g} | {widths} | {r.registers} | {spills} | "
                f"{r.stack} | {r.shared} | {total} | {said} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
