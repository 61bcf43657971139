"""Reads a TPU kernel's final bundles, as libtpu writes them: which run when, and what is in them.

A line is one bundle, what the core issues in one cycle: address, an optional tag, `>` for each loop around it, and the
instructions, `;;` between them. Comments name the regions that start there, and branches (`sbr.rel`) jump to regions.
A branch forward makes what it jumps over conditional, a branch backward ends a loop.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}[ ,]*)*:[> ]*\{")
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
INSTRUCTION = re.compile(r"(?:%\S+ = )?([a-z][\w.]*)(.*)", re.DOTALL)
BRANCH = re.compile(r"target = \$region(\d+)")
DELAY_SLOTS = 4  # bundles behind a branch that run whether it is taken or not

TYPES = ("bf16", "f32", "f8e4m3b11", "f8e4m3", "f8e4", "f8e5m2", "f8e5", "s8", "u8", "s4", "u4")
EXPONENTIALS = ("vpow2", "vrcp", "vlog2", "vtanh", "vrsqrt", "verf", "vsigshft", "vsinq", "vcosq")


@dataclass
class Part:
    """A stretch of bundles that runs as often as one decision says: the kernel, a loop, or what a branch may skip.

    `bundles`, `operations` and `matmuls` (by type) leave out those of `parts`, the loops and branches inside.
    """

    kind: str  # "kernel", "loop" or "branch"
    start: int
    stop: int
    bundles: int = 0
    operations: Counter = field(default_factory=Counter)
    matmuls: Counter = field(default_factory=Counter)
    parts: list["Part"] = field(default_factory=list)

    def walk(self) -> Iterator["Part"]:
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def all_matmuls(self) -> Counter:
        return sum((part.matmuls for part in self.walk()), Counter())

    @property
    def all_operations(self) -> Counter:
        return sum((part.operations for part in self.walk()), Counter())

    @property
    def all_bundles(self) -> int:
        return sum(part.bundles for part in self.walk())


def parse(lines: Iterable[str]) -> Part:
    """The kernel as a tree of parts.

    Raises ValueError: there is no bundle, or the last one is not the kernel's exit.
    """
    texts = _bundles(lines)
    if not texts:
        raise ValueError("found no bundle: is this a `*-final_bundles.txt` of libtpu's?")
    if "exit bundle" not in texts[-1]:
        raise ValueError(f"the last of {len(texts)} bundles is not the kernel's exit: is the file whole?")
    start_of: dict[str, int] = {}
    branches, counted = [], []
    for index, text in enumerate(texts):
        for region in REGION.findall(text):
            start_of.setdefault(region, index)
        operations, matmuls = Counter(), Counter()
        for opcode, rest in _instructions(text):
            if opcode == "sbr.rel":
                branches.append((index, BRANCH.search(rest).group(1)))
            elif name := _operation(opcode, rest):
                operations[name] += 1
                if name == "vmatmul":
                    matmuls[next((kind for kind in TYPES if kind in opcode.split(".")), opcode)] += 1
        counted.append((operations, matmuls))
    kernel = Part("kernel", 0, len(texts))
    for part in sorted(_spans(branches, start_of, len(texts)), key=lambda part: (part.start, -part.stop)):
        _innermost(kernel, part.start).parts.append(part)
    for index, (operations, matmuls) in enumerate(counted):
        part = _innermost(kernel, index)
        part.bundles += 1
        part.operations += operations
        part.matmuls += matmuls
    return kernel


def _bundles(lines: Iterable[str]) -> list[str]:
    """The text of each bundle; lines that start none (comments go over several) belong to the one before."""
    texts: list[list[str]] = []
    for line in lines:
        if match := BUNDLE.match(line):
            texts.append([line[match.end() :]])
        elif texts:
            texts[-1].append(line)
    return ["".join(text) for text in texts]


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    for instruction in COMMENT.sub("", text).split(";;"):
        if match := INSTRUCTION.match(instruction.strip(" {}\n")):
            yield match.group(1), match.group(2)


def _operation(opcode: str, rest: str) -> str | None:
    """What an instruction counts as; None for what the estimate does not look at."""
    if opcode.startswith("vmatmul"):
        return "vmatmul"
    if "_spill]" in rest and opcode.startswith(("vst", "vld")):
        return "spill" if opcode.startswith("vst") else "fill"
    if opcode.startswith(EXPONENTIALS):
        return "eup"
    if ".xlane" in opcode or opcode.startswith(("vxpose", "vrot", "vperm")):
        return "xlu"
    if opcode.startswith("dma") and "done" not in opcode:
        return "dma"
    return None


def _spans(branches: list[tuple[int, str]], start_of: dict[str, int], end: int) -> Iterator[Part]:
    for index, region in branches:
        # The exit is the one target that no comment names.
        target, behind = start_of.get(region, end - 1), min(index + 1 + DELAY_SLOTS, end)
        if target <= index:
            yield Part("loop", target, behind)
        elif target > behind:
            yield Part("branch", behind, target)


def _innermost(part: Part, index: int) -> Part:
    for inner in part.parts:
        if inner.start <= index < inner.stop:
            return _innermost(inner, index)
    return part
