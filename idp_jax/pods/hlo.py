"""What a compiled program does, read from its text: products, and what devices tell each other.

XLA's own cost analysis counts the body of a loop once. Here every computation is counted as often
as it is called: a loop's by its trip count, which is written beside it, or by the number that its
condition compares with. A message that the TPU compiler spreads over several computations, to send
it while they work, is counted where it starts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_GOES_ON = "AsyncCollectiveDone"  # what a computation calls in which a message does not start
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
# Kernels of splash attention, and how many products each makes of all queries and keys.
_ATTENTION = re.compile(r"splash_mha_(fwd|dq|dkv)")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclass(frozen=True)
class Collective:
    """One kind of message between devices.

    Attributes:
        kind: one of KINDS.
        shape: of what a device holds afterwards, such as "bf16[4,2048,8192]".
        size: devices that take part.
        bytes: of it.
        count: how often, in the whole program.
    """

    kind: str
    shape: str
    size: int
    bytes: int
    count: int

    def seconds(self, link: float) -> float:
        """The time of all around a ring, at `link` bytes a second."""
        passes = 2 if self.kind == "all-reduce" else 1
        share = self.size - 1 if self.kind == "reduce-scatter" else (self.size - 1) / self.size
        if self.kind == "collective-permute":
            share = 1.0
        return self.count * passes * share * self.bytes / link


@dataclass(frozen=True)
class Counts:
    """What one device does in a program.

    Attributes:
        flops: of products, those in kernels as their authors say.
        collectives: the largest first.
        arrays: shapes of results, and bytes of each.
    """

    flops: float
    collectives: tuple[Collective, ...]
    arrays: dict[str, int]

    def bytes(self, kind: str | None = None) -> int:
        """Moved by one kind of message, or all."""
        return sum(c.bytes * c.count for c in self.collectives if kind in (None, c.kind))


@dataclass(frozen=True)
class _Instruction:
    name: str
    result: str  # its type
    opcode: str
    rest: str  # operands and attributes
    line: str
    starts: bool = True  # of messages: whether it is sent from here


def count(text: str) -> Counts:
    """Counts a program given as `compiled.as_text()`."""
    computations, entry = _read(text)
    flops, moved, arrays = 0.0, defaultdict(int), {}
    for instruction, times, fused, types in _walk(computations, entry):
        if not fused:
            arrays |= _arrays(instruction.result)
        flops += times * _flops(instruction, types)
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS and instruction.starts:
            moved[_message(kind, instruction)] += times
    collectives = [Collective(*key, count=n) for key, n in moved.items()]
    collectives.sort(key=lambda c: -c.bytes * c.count)
    return Counts(flops, tuple(collectives), arrays)


def _read(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, here = {}, "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            here = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(found[2]) if found else None
        if here is not None and found and opcode:
            result, rest = found[2][: opcode.start()], found[2][opcode.end() :]
            here.append(_Instruction(found[1], result, opcode[1], rest, line))
    for name, members in computations.items():
        if name.startswith("async_collective_fusion") or any(_GOES_ON in i.line for i in members):
            computations[name] = [replace(i, starts=False) for i in members]
    return computations, entry


def _walk(computations: dict, name: str, times: int = 1, fused: bool = False) -> Iterator[tuple]:
    """Every instruction, how often it runs, whether within a fusion, and types by name there."""
    types = {i.name: i.result for i in computations.get(name, [])}
    for instruction in computations.get(name, []):
        yield instruction, times, fused, types
        if instruction.opcode in (
            "reduce",
            "reduce-window",
            "sort",
            "scatter",
            "map",
            "all-reduce",
        ):
            continue  # they call scalar functions
        is_loop = instruction.opcode == "while"
        often = times * (_trips(instruction, computations) if is_loop else 1)
        inside = fused or instruction.opcode == "fusion"
        for called in _CALLED.findall(instruction.line):
            for inner in re.findall(r"%([\w.\-]+)", called):
                yield from _walk(computations, inner, often, inside)


def _trips(loop: _Instruction, computations: dict) -> int:
    """How often a loop's body runs; 1 where that is found out on the way."""
    known, condition = _TRIPS.search(loop.line), _CONDITION.search(loop.line)
    if known:
        return int(known[1])
    lines = [i.line for i in computations.get(condition[1], [])] if condition else []
    limits = [int(number) for line in lines for number in _LIMIT.findall(line)]
    counts_up = any("direction=LT" in line for line in lines)
    return limits[0] if counts_up and len(limits) == 1 else 1


def _arrays(result: str) -> dict[str, int]:
    return {f"{kind}[{sizes}]": _bytes(kind, sizes) for kind, sizes in _SHAPE.findall(result)}


def _bytes(kind: str, sizes: str) -> int:
    bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind.partition("e")[0]) or 8)
    return math.ceil(math.prod(_sizes(sizes)) * bits / 8)


def _sizes(sizes: str) -> list[int]:
    return [int(size) for size in sizes.split(",") if size]


def _message(kind: str, instruction: _Instruction) -> tuple[str, str, int, int]:
    shapes = _SHAPE.findall(instruction.result)
    if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(shapes) > 1:
        shapes = shapes[1:2]  # the operand stands before it
    shape = ", ".join(f"{dtype}[{sizes}]" for dtype, sizes in shapes)
    return kind, shape, _group(instruction), sum(_bytes(*shape) for shape in shapes)


def _group(instruction: _Instruction) -> int:
    """How many devices a message is between."""
    groups, mesh = _GROUPS.search(instruction.line), _MESH_GROUPS.search(instruction.line)
    if mesh:  # 'a'=64,'b'=4] {'a'}
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    if groups:
        return int(groups[1]) if groups[1] else len(groups[2].split(","))
    return 2


def _flops(instruction: _Instruction, types: dict[str, str]) -> float:
    if instruction.opcode == "custom-call":
        said = re.search(r'"flops":"?(\d+)', instruction.line)
        return float(said[1]) if said else _attention_flops(instruction)
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    result = math.prod(_sizes(_SHAPE.findall(instruction.result)[0][1]))
    operands = [_shape_of(operand, types) for operand in _operands(instruction.rest)]
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        contracted = math.prod(operands[0][axis] for axis in _sizes(axes[1] if axes else ""))
        return 2.0 * result * contracted
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 2.0 * result
    inputs = operands[1][labels[2].index("i")]
    places = _sizes(_SHAPE.findall(instruction.result)[0][1])
    taps = [
        _taps(window, operands[0][labels[1].index(axis)], places[labels[3].index(axis)])
        for axis, window in _windows(instruction.rest)
    ]
    return 2.0 * result * inputs * math.prod(taps)


def _attention_flops(instruction: _Instruction) -> float:
    """Of JAX's splash attention, which does not say them; 0 of other kernels.

    It skips what lies wholly behind a query; keys that stand before the input are visible to all.
    """
    named = _ATTENTION.match(instruction.name)
    arrays = re.search(r"operand_layout_constraints=\{(.*?\})\}", instruction.rest)
    if named is None or arrays is None:
        return 0.0
    queries, keys = (
        _sizes(sizes) for kind, sizes in _SHAPE.findall(arrays[1])[2:4] if kind[0] in "bf"
    )
    (*_, time, width), stored = queries, keys[-2]
    visible = time * stored - time * (time - 1) / 2
    return _PRODUCTS[named[1]] * 2.0 * math.prod(queries[:-2]) * width * visible


def _windows(rest: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The spatial axes of a convolution, as its labels name them, and what is said of each."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    said = dict(part.split("=") for part in window[1].split()) if window else {}
    axes = {name: values.split("x") for name, values in said.items()}
    for number in range(len(axes.get("size", ()))):
        yield str(number), {name: values[number] for name, values in axes.items()}


def _taps(window: dict[str, str], length: int, places: int) -> float:
    """The numbers of an input's axis that a convolution's result sums up, on average.

    Of a product of many matrices the compiler makes a convolution whose window meets zeros, between
    the numbers of a dilated input or beside it, in all places but one.
    """
    number = lambda name: int(window.get(name, 1))
    first = int(window.get("pad", "0").split("_")[0])
    reached = (
        place * number("stride") + tap * number("rhs_dilate") - first
        for place in range(places)
        for tap in range(number("size"))
    )
    last, step = (length - 1) * number("lhs_dilate"), number("lhs_dilate")
    return sum(0 <= at <= last and at % step == 0 for at in reached) / places


def _operands(rest: str) -> list[str]:
    """The operands of an instruction: what stands before the bracket that closes them."""
    depth, end = 0, len(rest)
    for place, letter in enumerate(rest):
        depth += (letter in "({[") - (letter in ")}]")
        if depth < 0:
            end = place
            break
    return re.split(r", (?=%|[a-z]+\d*\[)", rest[:end])


def _shape_of(operand: str, types: dict[str, str]) -> list[int]:
    name = operand.split("%")[-1].strip()
    typed = _SHAPE.search(operand) or _SHAPE.search(types.get(name, ""))
    return _sizes(typed[2]) if typed else []
