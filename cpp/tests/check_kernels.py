"""Reads what the CUDA compiler made of the kernels, from the object files (compiled with --no-compress).

    check_kernels.py [--table] OBJECT...

For every architecture in the objects, of every kernel:

1. Nothing lies in local memory: no spills, no stack frame (no load or store of that space, no frame in .nv.info).
2. At most 128 registers in kernels that go through x, so that 512 threads have room, but for those that say why not.
3. Kernels that go through x access it 128 bits at a time, beside the single elements of odd strides.

This reads the machine code itself, of which it needs a few opcodes and the width of a memory access, and no tool of the
CUDA toolkit. Each rule is first tried on a sample that breaks it.
"""

import re
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

CUDA_MACHINE = 190
# Records of .nv.info, each with a symbol's number and a value.
REGISTERS, FRAME, LEAST_STACK = 0x2F04, 0x1104, 0x1204
# The lowest nine bits of an instruction of Volta and later.
LOAD_GLOBAL, STORE_GLOBAL, LOAD_LOCAL, STORE_LOCAL = 0x181, 0x186, 0x183, 0x187
WIDE = 6  # 128 bits, in bits 73 to 75

# Kernels that go through x: how many of its arrays they read, and whether they write one.
HOT = {
    "rows_forward": (1, True),
    "rows_moments": (1, False),
    "rows_apply": (1, True),
    "rows_backward": (2, True),
    "rows_sums": (2, False),
    "rows_dx": (2, True),
    "columns_moments": (1, False),
    "columns_apply": (1, True),
    "columns_sums": (2, False),
    "columns_dx": (2, True),
}
# What leaves room for two blocks of 256 threads, or one of 512.
MOST_REGISTERS = 128
ONE_BLOCK = {"columns_moments", "columns_sums"}


class Kernel(NamedTuple):
    """A kernel as compiled for one architecture."""

    arch: int
    symbol: str
    registers: int
    frame: int
    wide_loads: int
    wide_stores: int
    local: int
    instructions: int

    @property
    def name(self) -> str:
        """The function's own name: _ZN7normkit4cuda12rows_forward... has it behind its length."""
        match = re.match(r"_ZN7normkit4cuda(\d+)", self.symbol)
        if not match:
            return self.symbol
        return self.symbol[match.end() : match.end() + int(match[1])]


def images(data: bytes) -> Iterator[bytes]:
    """Find the ELF files of the device inside an object file."""
    at = data.find(b"\x7fELF", 1)
    while at >= 0:
        if data[at + 4] == 2 and struct.unpack_from("<H", data, at + 18)[0] == CUDA_MACHINE:
            yield data[at:]
        at = data.find(b"\x7fELF", at + 1)


def kernels(image: bytes) -> Iterator[Kernel]:
    """Read the kernels of one device ELF file."""
    (offset,) = struct.unpack_from("<Q", image, 40)
    flags = struct.unpack_from("<I", image, 48)[0]
    size, count, names_at = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, offset + i * size) for i in range(count)]

    def text(section: int, at: int) -> str:
        begin = headers[section][4] + at
        return image[begin : image.index(b"\0", begin)].decode()

    named = {text(names_at, h[0]): h for h in headers}
    frames: dict[int, int] = {}
    registers: dict[int, int] = {}
    info = named.get(".nv.info")
    at, end = (info[4], info[4] + info[5]) if info else (0, 0)
    while at < end:
        kind, length = struct.unpack_from("<HH", image, at)
        if kind & 0xFF != 4:  # a value in the place of the length
            at += 4
            continue
        if kind in (REGISTERS, FRAME, LEAST_STACK):
            symbol, value = struct.unpack_from("<II", image, at + 4)
            into = registers if kind == REGISTERS else frames
            into[symbol] = max(into.get(symbol, 0), value)
        at += 4 + length
    symbols = named[".symtab"]
    by_name = {}
    for i in range(symbols[5] // 24):
        name, *_ = struct.unpack_from("<IBBHQQ", image, symbols[4] + 24 * i)
        by_name[text(symbols[6], name)] = i
    for name, header in named.items():
        if not name.startswith(".text."):
            continue
        symbol = name.removeprefix(".text.")
        number = by_name[symbol]
        wide = {LOAD_GLOBAL: 0, STORE_GLOBAL: 0}
        local = instructions = 0
        for i in range(header[4], header[4] + header[5], 16):
            low, high = struct.unpack_from("<QQ", image, i)
            opcode = low & 0x1FF
            instructions += 1
            if opcode in (LOAD_LOCAL, STORE_LOCAL):
                local += 1
            elif opcode in wide and high >> 9 & 7 == WIDE:
                wide[opcode] += 1
        yield Kernel(
            flags >> 8 & 0xFF,
            symbol,
            registers.get(number, -1),
            frames.get(number, 0),
            wide[LOAD_GLOBAL],
            wide[STORE_GLOBAL],
            local,
            instructions,
        )


def complaints(k: Kernel) -> Iterator[str]:
    if k.local or k.frame:
        yield f"{k.local} accesses of local memory, a frame of {k.frame} bytes"
    # A resident set of float64 has 256 threads at most.
    alone = k.name in ONE_BLOCK or ("IdL" in k.symbol and k.name.startswith("rows_"))
    if not 0 < k.registers <= (255 if alone or k.name not in HOT else MOST_REGISTERS):
        yield f"{k.registers} registers"
    if k.name in HOT:
        arrays, writes = HOT[k.name]
        if k.wide_loads < arrays:
            yield f"{k.wide_loads} loads of 128 bits"
        if writes and k.wide_stores < 1:
            yield "no store of 128 bits"


def try_rules() -> None:
    good = Kernel(90, "_ZN7normkit4cuda12rows_forwardIfEEv", 90, 0, 8, 8, 0, 1000)
    assert good.name == "rows_forward"
    assert not list(complaints(good))
    for bad in (
        good._replace(registers=129),
        good._replace(registers=-1),
        good._replace(frame=8),
        good._replace(local=1),
        good._replace(wide_loads=0),
        good._replace(wide_stores=0),
    ):
        assert list(complaints(bad)), bad


def main(objects: list[str], table: bool) -> int:
    try_rules()
    seen: set[str] = set()
    failed = False
    for path in objects:
        with open(path, "rb") as file:
            data = file.read()
        for image in images(data):
            for k in kernels(image):
                seen.add(k.name)
                found = list(complaints(k))
                failed = failed or bool(found)
                if table or found:
                    print(
                        f"sm_{k.arch} {k.registers:4} registers {k.frame:3} frame {k.local:3} local "
                        f"{k.wide_loads:3} LDG.128 {k.wide_stores:3} STG.128 {k.instructions:6}  {k.symbol}"
                    )
                for complaint in found:
                    print(f"  {complaint}")
    missing = set(HOT) - seen
    if missing:
        print("not found:", *sorted(missing))
    print(f"{len(seen)} kernels in {len(objects)} objects: {'failed' if failed or missing else 'ok'}")
    return int(failed or bool(missing))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments:
        sys.exit(__doc__)
    sys.exit(main([a for a in arguments if a.endswith(".o")], "--table" in arguments))
