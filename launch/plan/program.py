"""Reading a partitioned program (HLO text): its collectives, over which mesh axis, how often, how many bytes.

What the CPU's pipeline writes differs from what an accelerator runs in four ways that can be told from the
text, so a collective is counted as an accelerator would run it:

- An all-reduce of which each device then slices its own part is a reduce-scatter: the CPU emits none.
- Partial sums of products that are added up afterwards are added before they are exchanged (XLA's
  all-reduce reassociation).
- Partial sums are exchanged in the dtype that they are cast to: the CPU forms products in float32.
- Two gathers of one array within a computation are one.

A sum over several mesh axes is told apart into sums over each, innermost first, each of the part that a
device then has to pass on: as a hierarchy of rings would do it, and no byte more than one ring over all. Of
two axes as large as the parts, the one that scatters is not `expert`: what that divides isn't summed there.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
# What an all-reduce's result may pass through and still be its result.
_PLAIN = ("convert", "copy", "reshape", "transpose", "bitcast", "optimization-barrier")


class Instruction(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)


class Collective(NamedTuple):
    """One exchange of an array of `size` bytes, whole: as gathered, or as it is before it is scattered."""

    kind: str
    axis: str  # of the mesh
    devices: int  # along it
    size: int
    dtype: str
    times: int  # in one run of the program
    source: str  # the operation that it comes from, as JAX names it

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one run of the program."""
        return self.times * ring_bytes(self.kind, self.size, self.devices)


def ring_bytes(kind: str, size: float | int, devices: int) -> float:
    """Bytes that each of so many devices sends to exchange an array of `size` bytes (see `Collective`).

    In a ring a gather or a scatter passes on all parts but one, and an all-reduce is a scatter and a gather
    (Patarasuk & Yuan 2009); an all-to-all sends all parts but one's own, a permutation everything.
    """
    if devices == 1:
        return 0.0
    factor = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}
    return size * factor.get(kind, (devices - 1) / devices)


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program just after partitioning, as an accelerator would run them."""
    computations, entry = _parse(hlo)
    times = _times(computations, entry)
    return [
        one._replace(times=times[name])
        for name, body in computations.items()
        if times[name]
        for one in _of_computation(body, mesh)
    ]


def _of_computation(body: Sequence[Instruction], mesh: Mapping[str, int]) -> Iterator[Collective]:
    users: dict[str, list[Instruction]] = defaultdict(list)
    for one in body:
        for operand in dict.fromkeys(one.operands):
            users[operand].append(one)
    seen = set()
    for one in body:
        if one.opcode not in KINDS:
            continue
        axes = _axes(one.attributes, mesh)
        devices = math.prod(mesh[axis] for axis in axes)
        kind, dtype, shape = one.opcode, one.dtype, one.shape
        key: tuple = (one.arguments, shape)
        parts = 1
        if kind == "all-reduce":
            end, parts, dtype = _followed(one, users)
            key = (end,)
        elif kind == "reduce-scatter":
            dimension = int(re.findall(r"dimensions=\{(\d+)\}", one.attributes)[0])
            shape = tuple(n * devices if i == dimension else n for i, n in enumerate(shape))
            kind, parts = "all-reduce", devices
        if (kind, axes, *key) in seen:
            continue
        seen.add((kind, axes, *key))
        source = re.findall(r'op_name="([^"]*)"', one.attributes)
        whole = Collective(
            kind, "", 1, BYTES[dtype] * math.prod(shape), dtype, 1, source[0] if source else ""
        )
        yield from _along_each(whole, axes, mesh, parts)


def _along_each(one: Collective, axes: Sequence[str], mesh: Mapping[str, int], parts: int):
    """A collective over several axes as one along each; a sum of which each device keeps one of `parts`."""
    if one.kind != "all-reduce":
        if len(axes) > 1:
            raise ValueError(f"{one.kind} over {axes}: only sums are told apart by axis")
        yield from (one._replace(axis=axis, devices=mesh[axis]) for axis in axes)
        return
    size = one.size
    inner = [axis for axis in reversed(axes) if axis != "expert"]
    likely = [*inner, *(axis for axis in axes if axis == "expert")]
    scattered = next(
        c for n in range(len(axes) + 1) for c in itertools.combinations(likely, n)
        if math.prod(mesh[axis] for axis in c) == parts
    )  # fmt: skip
    for axis in scattered:
        yield one._replace(kind="reduce-scatter", axis=axis, devices=mesh[axis], size=size)
        size //= mesh[axis]
    for axis in reversed(axes):
        if axis not in scattered:
            yield one._replace(axis=axis, devices=mesh[axis], size=size)
            size //= mesh[axis]


def _followed(one: Instruction, users: Mapping[str, list[Instruction]]) -> tuple[str, int, str]:
    """Where a sum goes: the last array that is it but for casts and further terms; of how many parts each
    device keeps one; and the dtype.
    """
    dtype, last, reading = one.dtype, one, users[one.name]
    while len(reading) == 1 and reading[0].opcode in (*_PLAIN, "add"):
        last, reading = reading[0], users[reading[0].name]
        dtype = min(dtype, last.dtype, key=BYTES.__getitem__)
    if not reading or any(user.opcode != "dynamic-slice" for user in reading):
        return last.name, 1, dtype
    casts = [user.dtype for part in reading for user in users[part.name] if user.opcode == "convert"]
    parts = math.prod(last.shape) // math.prod(reading[0].shape)
    return last.name, parts, min(dtype, *casts, key=BYTES.__getitem__) if casts else dtype


_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = \(?(\w+)\[([\d,]*)\].*? ([\w-]+)\((.*)")


def _parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the one that the program begins with."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    body: list[Instruction] = []
    for line in hlo.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.-]+)[ .(].*\{$", line):
            body = computations.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        elif match := _LINE.match(line):
            name, dtype, shape, opcode, rest = match.groups()
            end = _closing(rest)
            dims = tuple(map(int, filter(None, shape.split(","))))
            body.append(Instruction(name, dtype, dims, opcode, rest[:end], rest[end + 1 :]))
    return computations, entry


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened before `text`."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    return len(text)


def _times(computations: Mapping[str, Sequence[Instruction]], entry: str) -> Counter[str]:
    """How often each computation is run."""
    times: Counter[str] = Counter()

    def visit(name: str, runs: int) -> None:
        times[name] += runs
        for one in computations[name]:
            called = dict(re.findall(r"(body|condition|to_apply|calls)=%?([\w.-]+)", one.attributes))
            if one.opcode == "while":
                visit(called["body"], runs * _trips(computations[called["condition"]]))
            elif one.opcode in ("call", "fusion"):
                visit(called.get("to_apply") or called["calls"], runs)

    visit(entry, 1)
    return times


def _trips(condition: Sequence[Instruction]) -> int:
    """Of a loop over a scan: its condition compares a counter, which begins at 0, with one constant."""
    (bound,) = {one.arguments for one in condition if one.opcode == "constant"}
    return int(bound)


def _axes(attributes: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of one group differ."""
    members = np.stack(np.unravel_index(_group(attributes), tuple(mesh.values())))
    differ = (members != members[:, :1]).any(axis=1)
    return tuple(axis for axis, varies in zip(mesh, differ, strict=True) if varies)


def _group(attributes: str) -> np.ndarray:
    """The devices of the first group of more than one, in any of the ways that HLO writes groups."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        pairs = [pair.split(",") for pair in re.findall(r"\d+,\d+", match[1])]
        return np.array(next((pair for pair in pairs if pair[0] != pair[1]), pairs[0]), int)
    text = attributes[attributes.index("replica_groups=") + len("replica_groups=") :]
    if text.startswith("{"):  # {{0,1},{2,3}}
        return np.array(re.match(r"\{\{([\d,]+)\}", text)[1].split(","), int)  # type: ignore[index]
    if text.startswith("["):  # [groups,members]<=[dims]T(order)
        match = re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
        shape = [int(n) for n in match[1].split(",")]  # type: ignore[index]
        return _iota(match[2][2:]).reshape(shape)[0]  # type: ignore[index]
    # mesh['a'=64,'b'=8], device_ids=([64,8]T(1,0)) {'a'}
    match = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? \{([^}]*)\}", text)
    assert match is not None, f"groups of a collective are written in an unknown way: {text[:200]}"
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
    devices = _iota(match[2]) if match[2] else np.arange(math.prod(map(int, sizes)))
    chosen = [names.index(name) for name in re.findall(r"'(\w+)'", match[3])]
    at = tuple(slice(None) if i in chosen else 0 for i in range(len(names)))
    return devices.reshape([int(size) for size in sizes])[at].ravel()


def _iota(text: str) -> np.ndarray:
    """`[64,8]T(1,0)`: the numbers 0, 1, 2, ... in that shape, transposed, flat."""
    dims, *order = re.findall(r"[\[(]([\d,]+)[\])]", text)
    numbers = np.arange(math.prod(map(int, dims.split(",")))).reshape([int(n) for n in dims.split(",")])
    return (numbers.transpose([int(n) for n in order[0].split(",")]) if order else numbers).ravel()
