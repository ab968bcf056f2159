"""What ptxas made of a kernel: uniform registers that are read before anything wrote them.

ptxas 12.8 (triton 3.6) can lose the address of an operand of a Hopper product (wgmma) where two operands have the same
place in shared memory. The kernel then reads elsewhere: wrong numbers, or an illegal address, by chance.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator

LINE = re.compile(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")
REGISTER = re.compile(r"\bUR(\d+)\b")
WRITES = ("U", "R2UR", "S2UR", "CS2UR", "REDUX", "VOTEU")  # instructions whose first operand may be a uniform register


def unwritten(listing: str) -> list[str]:
    """The instructions of a listing of nvdisasm that read a uniform register above which nothing writes it."""
    written: set[int] = set()
    found = []
    for line in listing.splitlines():
        match = LINE.match(line)
        if not match:
            continue
        name, operands = match[1], [operand.strip() for operand in match[2].split(",")]
        writes = name.startswith(WRITES) and operands[0].startswith("UR")
        read = {register for operand in operands[writes:] for register in _read(name, operand, operands)}
        if name.startswith("CALL"):  # of a division, say, whose code stands further down: it may write any
            written = set(range(64))
        if not read <= written:
            found.append(f"{name} {match[2]}")
        if writes and operands[0] != "URZ":  # only the carry or the predicate is wanted
            first = int(operands[0][2:])
            written |= set(range(first, first + (2 if _pairs(name) or ".WIDE" in name else 1)))
    return found


def _read(name: str, operand: str, operands: list[str]) -> Iterator[int]:
    """A descriptor of a product is four registers, of which the first two are for an operand in shared memory."""
    for register in map(int, REGISTER.findall(operand)):
        if operand.startswith("gdesc"):
            first = 2 if re.fullmatch(r"R\d+", operands[1]) else 0
            yield from range(register + first, register + 4)
        else:
            yield from range(register, register + (2 if operand.startswith("desc") or _pairs(name) else 1))


def _pairs(name: str) -> bool:
    """Whether every operand is 64 bits; of a product, the result alone is."""
    return name.startswith("U") and ".64" in name and ".HI" not in name


def listing(cubin: bytes) -> str:
    """The machine code of a compiled kernel, by the nvdisasm that triton brings."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
