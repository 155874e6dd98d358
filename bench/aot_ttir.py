"""Finds pointer offsets that can leave int32, in Triton's own intermediate representation (TTIR).

The rule. Every integer of a kernel is given an interval: constants and `tl.arange` their values, a program id
the bound of the grid's axis (`Variant.grid`; 2^31 - 1 where there is none), an integer argument the bound of
`BOUNDS`, whatever is loaded the range of its type. Intervals go forward through the arithmetic, loops
and branches. An error is an int32 multiplication (a left shift is one), or a truncation to int32, whose exact
result need not lie in int32 and which reaches the offset of a `tt.addptr` or a coordinate of a descriptor,
directly or through further arithmetic. Widening such a result to int64 afterwards does not help: it is wrong
by then. So `row * stride` passes only with one of them widened before, and `program_id(1) * BLOCK` passes
where the declared grid keeps it below 2^31. Sums of int32 that pass are not errors: columns are below V, and
V is far enough from 2^31 for the block that hangs over.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

LOCATION = re.compile(r'\s*loc\((?:[^()"]|"[^"]*"|\([^()]*\))*\)')
NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "index": 64}
SAME_VALUES = {
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.unsplat", "tt.cat", "tt.join",
    "arith.extsi", "arith.extui", "arith.index_cast", "arith.select", "tt.bitcast",
}  # fmt: skip


@dataclass(frozen=True)
class Range:
    """What an integer can be, and the text of the overflowing operation it stems from, if any."""

    low: int
    high: int
    culprit: str = ""

    @classmethod
    def of_type(cls, kind: str, culprit: str = "") -> "Range":
        """Every value of an integer type."""
        half = 1 << (BITS[kind] - 1)
        return cls(0, 1, culprit) if kind == "i1" else cls(-half, half - 1, culprit)

    def join(self, other: "Range") -> "Range":
        """Either of two."""
        return Range(min(self.low, other.low), max(self.high, other.high), self.culprit or other.culprit)

    def within(self, other: "Range") -> bool:
        """Whether it adds nothing to another."""
        covered = other.low <= self.low and self.high <= other.high
        return covered and (not self.culprit or bool(other.culprit))


@dataclass
class Operation:
    """A line of TTIR, with the lines of its regions."""

    text: str
    regions: list[list["Operation"]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As `arith.muli`."""
        match = re.match(r'(?:%[^=]*= )?"?([\w.]+)"?', self.text)
        return match.group(1) if match else ""

    @property
    def results(self) -> list[str]:
        """Names of the results."""
        match = re.match(r"(%[\w.$-]+)(?::(\d+))? = ", self.text)
        if match is None:
            return []
        name, count = match.groups()
        return [name] if count is None else [f"{name}#{index}" for index in range(int(count))]

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order; those that a loop header binds among them."""
        return NAME.findall(self.text.split(" = ", 1)[1] if self.results else self.text)


def overflows(ttir: str, bounds: Mapping[str, int], grid: tuple[int | None, ...]) -> list[str]:
    """Texts of the operations that break the rule, each with the offset it reaches; empty if none does.

    Args:
        ttir: `compiled.asm["ttir"]`.
        bounds: largest value of integer arguments, by name; the least is 1, nothing empty is launched.
        grid: number of programs on each axis at most, None where it is not bounded.
    """
    found: list[str] = []
    for operation in parse(ttir):
        if operation.name == "tt.func":
            walk = _Walk(grid, found)
            for name, kind in re.findall(r"%([\w.$-]+): (i\d+)", operation.text):
                known = Range(1, bounds[name]) if name in bounds else Range.of_type(kind)
                walk.values[f"%{name}"] = known
            walk.block(operation.regions[0])
    return list(dict.fromkeys(found))


def parse(ttir: str) -> list[Operation]:
    """The operations in a module."""
    top: list[Operation] = []
    open_blocks, open_operations = [top], [Operation("module")]
    for line in ttir.splitlines():
        text = LOCATION.sub("", line).strip()
        if not text or text.startswith("#") or text.startswith("module"):
            continue
        if text.startswith("}"):
            if len(open_blocks) == 1:
                continue
            open_blocks.pop()
            operation = open_operations[-1]
            if text.endswith("{"):  # } else {, } do {
                operation.regions.append([])
                open_blocks.append(operation.regions[-1])
            else:
                operation.text += " " + re.sub(r"^\}\)?", "", text).strip()
                open_operations.pop()
            continue
        operation = Operation(text.rstrip("({ ") if text.endswith("{") else text)
        open_blocks[-1].append(operation)
        if text.endswith("{"):
            operation.regions.append([])
            open_blocks.append(operation.regions[-1])
            open_operations.append(operation)
    return top


class _Walk:
    """Ranges of one function's integers; what breaks the rule goes to `found`."""

    def __init__(self, grid: tuple[int | None, ...], found: list[str]) -> None:
        self.grid, self.found = grid, found
        self.values: dict[str, Range] = {}

    def block(self, operations: list[Operation]) -> list[Range | None]:
        """Runs a block; the ranges of what it yields."""
        yielded: list[Range | None] = []
        for operation in operations:
            if operation.name in ("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return"):
                yielded = [self.values.get(name) for name in operation.operands]
                if operation.name == "scf.condition":
                    yielded = yielded[1:]
            elif operation.text.startswith("^"):
                for name, kind in re.findall(r"(%[\w.$-]+): \D*(i\d+)", operation.text):
                    self.values[name] = Range.of_type(kind)
            else:
                self._check(operation)
                self._run(operation)
        return yielded

    def _check(self, operation: Operation) -> None:
        if operation.name == "tt.addptr":
            used = operation.operands[1:2]
        elif operation.name.startswith(("tt.descriptor_", "tt.advance")):
            used = operation.operands[1:]
        else:
            return
        for name in used:
            culprit = self.values[name].culprit if name in self.values else ""
            if culprit:
                self.found.append(f"{culprit}  reaches  {operation.text}")

    def _run(self, operation: Operation) -> None:
        if operation.name == "scf.for":
            results = self._loop(operation)
        elif operation.regions:
            results = self._regions(operation)
        else:
            results = [self._value(operation)]
        for name, value in zip(operation.results, results, strict=False):
            if value is None:
                self.values.pop(name, None)
            else:
                self.values[name] = value

    def _loop(self, operation: Operation) -> list[Range | None]:
        """A loop's variable lies between its bounds; carried values are widened until they are stable."""
        head, _, carried = operation.text.split(" = scf.for ")[-1].partition("iter_args(")
        variable, first, last, _ = NAME.findall(head)[:4]
        pairs = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", carried.split(") ->")[0])
        start = self.values.get(first, Range.of_type("i64"))
        stop = self.values.get(last, Range.of_type("i64"))
        index = start.join(stop)
        self.values[variable] = Range(index.low, max(index.high - 1, index.low), index.culprit)
        state = [self.values.get(value) for _, value in pairs]
        kinds = _types(operation.text.split("->")[-1]) if pairs else []
        while True:
            for (name, _), value in zip(pairs, state, strict=True):
                if value is not None:
                    self.values[name] = value
            yielded = self.block(operation.regions[0])
            grown = [
                now if now is None or new is None or new.within(now) else Range.of_type(kind, new.culprit)
                for now, new, kind in zip(state, yielded, kinds, strict=False)
            ]
            if grown == state:
                return list(state)
            state = grown

    def _regions(self, operation: Operation) -> list[Range | None]:
        """Branches, and whatever else has regions: any value of the type, or of what the branches yield."""
        culprit = self._culprit(operation)
        ends = [self.block(region) for region in operation.regions]
        if operation.name == "scf.if" and len(ends) == 2:
            return [a.join(b) if a and b else None for a, b in zip(*ends, strict=True)]
        for end in ends:
            culprit = culprit or next((value.culprit for value in end if value and value.culprit), "")
        kinds = _types(operation.text.split("->")[-1])
        return [Range.of_type(kind, culprit) if kind in BITS else None for kind in kinds]

    def _culprit(self, operation: Operation) -> str:
        known = (self.values[name] for name in operation.operands if name in self.values)
        return next((value.culprit for value in known if value.culprit), "")

    def _value(self, operation: Operation) -> Range | None:
        """Range of an operation's only result; None if that is no integer."""
        kind, name = _result_type(operation), operation.name
        if kind not in BITS:
            return None
        if name == "arith.constant":
            match = re.search(r"constant (?:dense<)?(-?\d+|true|false)", operation.text)
            if match is None:
                return Range.of_type(kind)
            number = {"true": 1, "false": 0}.get(match.group(1))
            number = int(match.group(1)) if number is None else number
            return Range(number, number)
        if name == "tt.make_range":
            end, start = (int(x) for x in re.findall(r"(?:end|start) = (\d+)", operation.text))
            return Range(start, end - 1)
        if name == "tt.get_program_id":
            axis = "xyz".index(operation.text.split("get_program_id ")[1][0])
            most = self.grid[axis] if axis < len(self.grid) else None
            return Range(0, (1 << 31) - 1 if most is None else most - 1)
        if name in ("tt.load", "arith.cmpi", "arith.cmpf", "tt.get_num_programs"):
            return Range.of_type(kind)
        return self._arithmetic(operation, kind)

    def _arithmetic(self, operation: Operation, kind: str) -> Range:
        values = [self.values.get(name, Range.of_type(kind)) for name in operation.operands]
        culprit = self._culprit(operation)
        if operation.name in SAME_VALUES:
            values = values[1:] if operation.name == "arith.select" else values
            joined = values[0]
            for value in values[1:]:
                joined = joined.join(value)
            exact: Range | None = joined
        else:
            exact = _exact(operation.name, values)
        limits = Range.of_type(kind)
        if exact is None:
            return Range.of_type(kind, culprit)
        if exact.low >= limits.low and exact.high <= limits.high:
            return Range(exact.low, exact.high, culprit)
        if kind == "i32" and operation.name in ("arith.muli", "arith.shli", "arith.trunci"):
            culprit = culprit or operation.text
        return Range.of_type(kind, culprit)


def _exact(name: str, values: list[Range]) -> Range | None:
    """Range of the exact result of arithmetic, before it is cut to its type; None if it is not known."""
    a, b = values[0], values[-1]
    match name.removeprefix("arith."):
        case "addi":
            return Range(a.low + b.low, a.high + b.high)
        case "subi":
            return Range(a.low - b.high, a.high - b.low)
        case "muli":
            return _span(x * y for x in (a.low, a.high) for y in (b.low, b.high))
        case "shli" if b.low >= 0 and b.high < 64:
            return _span(x << y for x in (a.low, a.high) for y in (b.low, b.high))
        case "divsi" | "divui" | "floordivsi" | "ceildivsi" if b.low > 0 and a.low >= 0:
            return Range(a.low // b.high, -(-a.high // b.low))
        case "remsi" | "remui" if b.low > 0 and a.low >= 0:
            return Range(0, min(a.high, b.high - 1))
        case "shrsi" | "shrui" | "andi" if a.low >= 0:
            return Range(0, a.high)
        case "minsi" | "minui":
            return Range(min(a.low, b.low), min(a.high, b.high))
        case "maxsi" | "maxui":
            return Range(max(a.low, b.low), max(a.high, b.high))
        case "trunci":
            return a
    return None


def _span(products: Iterable[int]) -> Range:
    numbers = list(products)
    return Range(min(numbers), max(numbers))


def _types(text: str) -> list[str]:
    """Element types of a list of types, as `(f32, tensor<4xi32>) : i32`."""
    text = text.strip()
    inner = text[1 : text.index(")")] if text.startswith("(") else text
    return [_element(part) for part in re.split(r", (?![^<]*>)", inner)]


def _result_type(operation: Operation) -> str:
    """Element type of the result; what a pointer points to for a load."""
    if not operation.results:
        return ""
    if operation.name in ("arith.cmpi", "arith.cmpf"):
        return "i1"
    last = re.split(r" : | to | -> |, (?![^<]*>)", operation.text)[-1].strip()
    if operation.name == "tt.load":
        last = last.replace("!tt.ptr<", "")
    return _element(last)


def _element(text: str) -> str:
    if "!tt.ptr" in text or "!tt.tensordesc" in text:
        return "pointer"
    match = re.search(r"(?:^|x)(i\d+|index|[a-z]+\d+\w*)\b", text)
    return match.group(1) if match else ""
