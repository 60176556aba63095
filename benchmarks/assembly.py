"""What a compiled kernel's assembly says: its passes' loops, their instructions by pipe, access widths, registers."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Pass:
    """The loop of one kind of pass."""

    per_element: dict[str, float]  # instructions by pipe
    widths: Counter  # bytes -> accesses of global memory

    @property
    def instructions(self) -> float:
        return sum(self.per_element.values())


@dataclass(frozen=True)
class Report:
    registers: int
    spills: int  # loads and stores of local memory
    stack: int  # bytes
    shared: int  # bytes
    passes: dict[str, Pass] = field(default_factory=dict)  # by name: those of PassShape
    in_lanes: int = 0  # gfx942: scalars kept in lanes of a vector register, for want of scalar registers


@dataclass(frozen=True)
class PassShape:
    """How to find a pass among a kernel's loops: by the stores of a thread's elements."""

    name: str
    elements: int  # of a thread and pass
    stores: int | None = None  # of a thread and pass; None: the one with stores of 16 bytes
    counters: int = 0  # that a thread draws in a loop inside the pass, if it is one


class Nvidia:
    """SASS, by the disassemblers in Triton's wheel."""

    branch = r"BRA[.\w]*\s.*?`\((\.L_\w+)\)"
    multiply = r"IMAD\.(WIDE|HI)"
    access = r"\b(LDG|STG)\S*"
    store = r"\bSTG\b"

    @classmethod
    def read(cls, cubin: bytes, shapes: list[PassShape]) -> Report:
        import triton

        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = _run(tools / "cuobjdump", "-res-usage", file.name)
            listing = _run(tools / "nvdisasm", "-c", file.name)
        lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in listing.splitlines()]
        lines = [line for line in lines if line.startswith(".L_") or line.endswith(";")]
        local = [line for line in lines if re.search(r"\b(LDL|STL)\b", line)]
        resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
        passes = find_passes(cls, lines, shapes)
        return Report(resources["REG"], len(local), resources["STACK"], resources["SHARED"], passes)

    @staticmethod
    def width(access: str) -> int:
        bits = re.search(r"\.(128|64|U16|S16|U8|S8)\b", access)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[bits.group(1)] if bits else 4

    @staticmethod
    def pipe(line: str) -> str:
        base = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].rstrip(";").split(".")[0]
        if base in {"FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "FCHK", "FMUL2", "FFMA2", "FADD2"}:
            return "FP32"
        if base == "IMAD":
            return "IMAD"
        if base == "MUFU" or base.startswith(("F2", "I2")):
            return "SFU"
        if base in {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL", "STL"}:
            return "LSU"
        integer = {"IADD3", "IADD", "VIADD", "ISETP", "LOP3", "SHF", "SEL", "LEA", "VIADDMNMX", "PRMT", "IABS"}
        return "INT" if base in integer | {"ISCADD"} else "other"


class Amd:
    """AMDGCN assembly."""

    branch = r"s_c?branch\w*\s+(\.LBB\w+)"
    multiply = r"v_(mad_u64_u32|mul_hi_u32)\b"
    access = r"\b(?:global|buffer)_(?:load|store)_\w+"
    store = r"\b(?:global|buffer)_store_"

    @classmethod
    def read(cls, assembly: str, shapes: list[PassShape]) -> Report:
        def number(name):
            return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

        lines = [line.split(";")[0].strip() for line in assembly.splitlines()]
        lines = [line for line in lines if re.match(r"\.LBB\w+:$|[a-z]+_\w+(\s|$)", line)]
        spills = sum(line.startswith("scratch_") for line in lines)
        stack, shared = number("private_segment_fixed_size"), number("group_segment_fixed_size")
        passes = find_passes(cls, lines, shapes)
        return Report(number("vgpr_count"), spills, stack, shared, passes, number("sgpr_spill_count"))

    @staticmethod
    def width(access: str) -> int:
        words = re.search(r"dword(x[234])?", access)
        return int((words.group(1) or "x1")[1]) * 4 if words else 1 if "byte" in access else 2

    @staticmethod
    def pipe(line: str) -> str:
        return "VALU" if line.startswith("v_") else "SALU" if line.startswith("s_") else "memory"


def _run(*command) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def find_passes(machine, lines: list[str], shapes: list[PassShape]) -> dict[str, Pass]:
    """The passes among the outermost loops with stores. Raises LookupError if one is missing."""
    found = {}
    for start, end in outer_loops(machine, lines):
        loop = lines[start : end + 1]
        widths = Counter(machine.width(match.group()) for line in loop for match in re.finditer(machine.access, line))
        stored = [machine.width(re.search(machine.access, x).group()) for x in loop if re.search(machine.store, x)]
        stores = len(stored)
        for shape in shapes:
            wide = set(stored) == {16}
            if shape.name not in found and (wide if shape.stores is None else not wide and shape.stores == stores):
                weights = loop_weights(machine, loop, shape.counters)
                pipes: Counter = Counter()
                for line, weight in zip(loop, weights, strict=True):
                    if not line.startswith(".L"):
                        pipes[machine.pipe(line)] += weight
                per_element = {name: count / shape.elements for name, count in pipes.items()}
                found[shape.name] = Pass(per_element, widths)
                break
    missing = [shape.name for shape in shapes if shape.name not in found]
    if missing:
        raise LookupError(f"no loop looks like the passes {missing}: their stores may have changed")
    return found


def outer_loops(machine, lines: list[str]) -> list[tuple[int, int]]:
    """First and last lines of the loops that no other loop contains."""
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    spans = []
    for i, line in enumerate(lines):
        target = re.search(machine.branch, line)
        if target and labels[target.group(1)] < i:
            spans.append((labels[target.group(1)], i))
    outer: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if outer and start <= outer[-1][1]:
            outer[-1] = outer[-1][0], max(outer[-1][1], end)
        else:
            outer.append((start, end))
    return outer


def loop_weights(machine, loop: list[str], counters: int) -> list[float]:
    """How often a pass runs each line. A loop inside the loop draws ``counters``, of some 20 wide multiplications."""
    labels = {line.rstrip(":"): i for i, line in enumerate(loop) if line.startswith(".L")}
    weights = [1.0] * len(loop)
    for i, line in enumerate(loop[:-1]):
        target = re.search(machine.branch, line)
        if target and 0 < labels.get(target.group(1), len(loop)) < i:
            inside = range(labels[target.group(1)], i + 1)
            drawn = round(sum(bool(re.search(machine.multiply, loop[k])) for k in inside) / 20)
            for k in inside if drawn else ():
                weights[k] = counters / drawn
    return weights
