"""Reads what the compiler made of kernels.cpp for one instruction set, with nm and objdump.

    check_objects.py ISA OBJECT...

1. No weak symbol. The linker keeps one copy of a weak (inline, template) function for everybody, and it may be the one
   that only some machines can run.
2. Nothing is exported but tables of kernels, `normkit::cpu::kernels_ISA_DTYPE`, at least one in each object.
3. On x86-64 the widest registers are those of ISA: xmm, with no instruction of AVX, in baseline; ymm in avx2; zmm in
   avx512. They must be there, too: else this looks at the wrong thing.
4. No fused multiply-add: it would give other bits than the sets that have none. Those that are meant, whose product is
   exact, name their rounding (Adder, simd.h); compilers that fuse don't.

Each rule is first tried on a sample that breaks it, so that a rule that can't fail does not pass.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

WIDEST = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
WIDTHS = ("xmm", "ymm", "zmm")

# In the output of objdump: address, tab, prefixes, mnemonic, operands.
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t(?:(?:rep\w*|lock|bnd|notrack|data16|[c-g]s|rex\S*|\{\w+\})\s+)*(\S+)(.*)")
REGISTER = re.compile(r"%([xyz]mm)(\d+)")
# x86: vfmadd213ps, vfnmsub..., vfmaddsub... and the four operands of FMA4; ARM: fmla, fmls, fmadd, fnmsub.
FUSED = re.compile(r"v?fn?m(add|sub)|fml[as]")


def check_symbols(isa: str, listing: str) -> Iterator[str]:
    """Take what `nm --defined-only --demangle` prints."""
    tables = 0
    for line in listing.splitlines():
        _, kind, name = line.split(maxsplit=2)
        if kind in "VWuvw":
            yield f"weak symbol ({kind}): {name}"
        elif kind.isupper() or kind == "i":
            if re.fullmatch(rf"normkit::cpu::kernels_{isa}_\w+", name):
                tables += 1
            else:
                yield f"exported symbol that is no table of {isa} kernels ({kind}): {name}"
    if not tables:
        yield f"no table normkit::cpu::kernels_{isa}_DTYPE is exported"


def check_code(isa: str, x86: bool, code: str) -> Iterator[str]:
    """Take what `objdump --disassemble --demangle --no-show-raw-insn` prints."""
    widest = WIDEST[isa] if x86 else None
    seen: Counter[str] = Counter()
    first: dict[str, str] = {}
    function, instructions, right_width = "?", 0, 0
    for line in code.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        match = INSTRUCTION.match(line)
        if not match:
            continue
        instructions += 1
        mnemonic, operands = match[1], match[2].split("#")[0].rstrip()
        meant = "{rn-sae}" in operands
        complaints = {"fused multiply-add"} if FUSED.match(mnemonic) and not meant else set()
        if widest:
            if isa == "baseline" and mnemonic.startswith("v"):
                complaints.add("instruction of AVX")
            for width, number in REGISTER.findall(operands):
                right_width += width == widest
                if WIDTHS.index(width) > WIDTHS.index(widest):
                    complaints.add(f"register wider than {widest}")
                if isa != "avx512" and int(number) > 15:
                    complaints.add("register of AVX-512")
        for complaint in complaints:
            seen[complaint] += 1
            first.setdefault(complaint, f"{mnemonic}{operands} in {function}")
    if not instructions:
        yield "no instructions"
    elif widest and not right_width:
        yield f"no {widest} register: this was not compiled for {isa}"
    for complaint, times in seen.items():
        yield f"{complaint}: {times} times, first {first[complaint]}"


def try_rules() -> None:
    """Every rule passes what is right and complains of what breaks it."""
    table = "0000000000000000 D normkit::cpu::kernels_avx2_float32\n"
    local = "0000000000000000 t (anonymous namespace)::f()\n"
    assert not list(check_symbols("avx2", table + local))
    for bad in (
        local,
        table + "0000000000000000 W normkit::Moments::merge(normkit::Moments const&)\n",
        table + "0000000000000000 u f()::constants\n",
        table + "0000000000000000 T f()\n",
        table.replace("avx2", "avx512"),
    ):
        assert list(check_symbols("avx2", bad)), bad

    def complains(isa: str, *instructions: str) -> bool:
        lines = [f"{4 * i:6x}:\t{text}" for i, text in enumerate(instructions)]
        return bool(list(check_code(isa, True, "\n".join(["0000000000000000 <f()>:", *lines]))))

    good = {
        "baseline": "addps  %xmm15,%xmm0",
        "avx2": "vaddps %ymm15,%ymm0,%ymm0",
        "avx512": "vaddps %zmm31,%zmm0,%zmm0",
    }
    for isa, right in good.items():
        assert not complains(isa, right, "ret")
        assert complains(isa)
        assert complains(isa, "ret")
        assert complains(isa, right, "vfmadd231ps %xmm1,%xmm2,%xmm3")
    assert not complains("avx512", good["avx512"], "vfmadd231ps {rn-sae},%zmm1,%zmm2,%zmm3")
    for isa, bad in (
        ("baseline", "vzeroupper"),
        ("baseline", "vaddps %xmm1,%xmm0,%xmm0"),
        ("baseline", "vaddps %ymm1,%ymm0,%ymm0"),
        ("avx2", "vaddps %zmm1,%zmm0,%zmm0"),
        ("avx2", "vaddps %ymm16,%ymm0,%ymm0"),
    ):
        assert complains(isa, good[isa], bad), bad


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(isa: str, objects: list[str]) -> int:
    if isa not in WIDEST:
        print(f"{isa} has no row in WIDEST of {__file__}")
        return 1
    try_rules()
    failed = False
    for path in objects:
        x86 = "x86-64" in output("objdump", "--file-headers", path)
        complaints = [
            *check_symbols(isa, output("nm", "--defined-only", "--demangle", path)),
            *check_code(isa, x86, output("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path)),
        ]
        failed = failed or bool(complaints)
        print(f"{path}, {isa}: {'ok' if not complaints else ''}")
        for complaint in complaints:
            print(f"  {complaint}")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
