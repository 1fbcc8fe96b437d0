"""Read machine code as nvdisasm prints it: blocks, loops, and what runs in them how often.

A region is the code that runs equally often: what is outside of loops, what runs at each round of a
loop, and each condition within a loop.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

ENDS = re.compile(r"\b(BRA|EXIT|RET|BRX|JMP)\b")
INSTRUCTION = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/)?\s*((?:@!?U?P\w+\s+)?[A-Z][^;]*?)\s*;")
# Counted by opcode alone; others keep their width or shape.
DETAILED = "HGMMA", "HMMA", "MUFU", "LDG", "STG", "LDGSTS", "LDS", "STS", "UTMALDG", "TCGEN05"
PRODUCTS, EXPONENTIALS, OTHER = "products", "exponentials", "other"  # kinds of regions
NESTED = "nested"  # OTHER, in a condition inside a condition


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    lines: list[str]
    follow: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Region:
    """Code that runs equally often. loop: its innermost loop, -1 outside; kind: see PRODUCTS.

    always: whether it runs at each round of the loop. depth: the conditions that it is inside.
    """

    loop: int
    always: bool
    depth: int
    lines: tuple[str, ...]

    @cached_property
    def opcodes(self) -> Counter[str]:
        return Counter(map(opcode, self.lines))

    @property
    def kind(self) -> str:
        return kind_of(self.opcodes)

    def count(self, *prefixes: str) -> int:
        """Return the number of instructions whose opcode begins with one of these."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefixes))


def kind_of(names: Iterable[str]) -> str:
    names = tuple(names)
    if any(name.startswith(("HGMMA", "HMMA", "TCGEN05", "UTCHMMA")) for name in names):
        return PRODUCTS
    return EXPONENTIALS if any(name.startswith("MUFU.EX2") for name in names) else OTHER


def opcode(line: str) -> str:
    """Return LDG.E.128 of `@P0 LDG.E.128 R4, [R2]`, FADD of `FADD.FTZ R1, R2, R3`.

    A wait for products ends with the number of groups that it leaves under way.
    """
    if left := re.search(r"(WARPGROUP\.DEPBAR)\S*\s+gsb0, 0x([0-9a-f]+)", line):
        return f"{left[1]} {int(left[2], 16)}"
    name = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]
    first = name.partition(".")[0]
    return name if first in DETAILED or name.startswith("WARPGROUP") else first


def blocks_of(text: str) -> list[Block]:
    """Return the blocks of a disassembly, in the order of their addresses."""
    blocks, at, branches = [Block([])], dict[str, int](), dict[int, str]()
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            if blocks[-1].lines:
                blocks.append(Block([]))
            at[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            blocks[-1].lines.append(found[1])
            if ENDS.search(found[1]):
                if to := re.search(r"`\((\.L_\w+)\)", found[1]):
                    branches[len(blocks) - 1] = to[1]
                blocks.append(Block([]))
    for i, block in enumerate(blocks):
        last = block.lines[-1] if block.lines else ""
        if i in branches and branches[i] in at:
            block.follow.append(at[branches[i]])
        always = ENDS.search(last) and not last.startswith("@") and ", " not in last.split("`")[0]
        if not always and i + 1 < len(blocks):
            block.follow.append(i + 1)
    return blocks


@dataclass(frozen=True)
class Loop:
    head: int
    latches: tuple[int, ...]  # blocks that branch back to the head
    body: frozenset[int]


def loops_of(blocks: Sequence[Block]) -> list[Loop]:
    """Return the loops by their first block. Blocks follow the order of addresses."""
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for j in block.follow:
            before[j].append(i)
    latches: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        for j in block.follow:
            if j <= i:
                latches.setdefault(j, []).append(i)
    loops = []
    for head, back in sorted(latches.items()):
        body, todo = {head}, list(back)
        while todo:
            i = todo.pop()
            # A jump to code far behind, and back into the middle, does not lead out of the loop.
            if i not in body and i >= head:
                body.add(i)
                todo += before[i]
        if sum(len(blocks[i].lines) for i in body) == 1:
            continue  # A branch to itself fills the end of every kernel.
        loops.append(Loop(head, tuple(back), frozenset(body)))
    return loops


def regions_of(text: str) -> list[Region]:
    """Return the regions: first the code outside of loops, then by loop and address."""
    blocks = blocks_of(text)
    loops = loops_of(blocks)
    inner: dict[int, int] = {}
    for number, loop in sorted(enumerate(loops), key=lambda pair: -len(pair[1].body)):
        inner |= dict.fromkeys(loop.body, number)
    outside = tuple(
        line for i, block in enumerate(blocks) if i not in inner for line in block.lines
    )
    regions = [Region(-1, True, 0, outside)]
    for number, loop in enumerate(loops):
        mine = sorted(i for i in loop.body if inner[i] == number)
        for always, depth, group in _equally_often(blocks, loop, mine):
            lines = tuple(line for i in group for line in blocks[i].lines)
            if lines:
                regions.append(Region(number, always, depth, lines))
    return regions


def _equally_often(
    blocks: Sequence[Block], loop: Loop, mine: Sequence[int]
) -> list[tuple[bool, int, list[int]]]:
    """Return groups of blocks of one round of a loop that all run or all do not.

    With each: whether it always runs, and the number of conditions that it is inside.

    Two blocks belong together if every path that has one has the other.
    """
    body = sorted(loop.body)
    back = set(loop.latches)
    forward = {i: [j for j in blocks[i].follow if j in loop.body and j > i] for i in body}
    reverse: dict[int, list[int]] = {i: [] for i in body}
    for i, follow in forward.items():
        for j in follow:
            reverse[j].append(i)
    first = _passed(body, lambda i: reverse[i], {loop.head})
    last = _passed(body[::-1], lambda i: forward[i], back)
    groups: list[list[int]] = []
    for i in mine:
        for group in groups:
            j = group[0]
            if j in first[i] and i in last[j]:
                group.append(i)
                break
        else:
            groups.append([i])
    sure = set.intersection(*(first[latch] for latch in back))
    conditions = [group[0] for group in groups if group[0] not in sure]
    found = []
    for group in groups:
        depth = sum(condition in first[group[0]] for condition in conditions)
        found.append((group[0] in sure, depth, group))
    return found


def _passed(
    order: Sequence[int], before: Callable[[int], Iterable[int]], starts: set[int]
) -> dict[int, set[int]]:
    """Return the blocks on every path from the starts to each block, in one pass."""
    passed: dict[int, set[int]] = {}
    for i in order:
        known = [passed[j] for j in before(i) if j in passed]
        common = set.intersection(*known) if known and i not in starts else set[int]()
        if i in starts or known:
            passed[i] = common | {i}
        else:
            passed[i] = {i}
    return passed


# ---- hazards ----


def bodies(text: str) -> list[list[str]]:
    """Return the instructions of each loop, from a label to a branch back to it."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i - 1:
            bodies.append(lines[labels[branch[1]] : i + 1])
    return bodies


def serial(loop: Sequence[str]) -> bool:
    """Tell if a loop has as many waits as products."""
    products, waits = (
        sum(opcode in line for line in loop) for opcode in ("HGMMA", "WARPGROUP.DEPBAR")
    )
    return 0 < products <= waits


def idle(region: Region) -> bool:
    """Tell if products of each round are waited for before the next round's begin."""
    return region.always and region.kind == PRODUCTS and bool(region.count("WARPGROUP.DEPBAR 0"))


COPIES = "LDGSTS", "UTMALDG", "UBLKCP"  # from memory to shared memory, behind the warps' backs


def unguarded(loop: Sequence[str]) -> bool:
    """Tell if shared memory is overwritten after a wait for a product, without a barrier.

    Other warps may still read it (Triton issue 11047). The loop is walked twice, as the wait may
    belong to the round before the copy.
    """
    waited = False
    for line in [*loop, *loop]:
        if "WARPGROUP.DEPBAR" in line:
            waited = True
        elif "BAR.SYNC" in line:
            waited = False
        elif waited and any(copy in line for copy in COPIES):
            return True
    return False
