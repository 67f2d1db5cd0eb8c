"""What the kernels compile to for an H100, without a GPU.

Each case calls a kernel's launcher on tensors without memory. The launch is recorded, compiled for
sm_90 as it would be on a device, and read back from the binary: registers, stack, spills, shared
memory, tensor-core instructions and 128-bit loads. It does not measure speed.

    python -m s1engine.kernels.compile_report            print the table
    python -m s1engine.kernels.compile_report --check    compare with the committed table; exit 1
    python -m s1engine.kernels.compile_report --write    make this the committed table
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

RESULTS = Path(__file__).parent.parent / "bench" / "results"
TABLE = RESULTS / "kernels_sm90.json"
PAGE = RESULTS / "kernels_sm90.md"

MAX_SHARED = 227 * 1024  # bytes of shared memory of a program on an H100
TYPES = {
    "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32",
    "torch.float8_e4m3fn": "fp8e4nv",
    "torch.int32": "i32", "torch.int64": "i64", "torch.uint8": "u8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A kernel's binary for sm_90."""

    kernel: str
    warps: int
    stages: int
    registers: int
    stack: int  # bytes
    spills: int  # instructions that load from or store to local memory
    shared: int  # bytes
    wgmma: int  # tensor-core instructions of a warp group
    mma: int  # tensor-core instructions of a warp
    loads128: int  # loads of 16 bytes a thread, into registers or shared memory
    early: int  # loads and prefetches before it waits for the previous kernel; -1: no wait

    def problems(self, tensor_cores: bool = False, early: bool = False) -> list[str]:
        """Errors, whatever the committed table holds."""
        problems = []
        if self.stack or self.spills:
            problems.append(f"{self.spills} spills, {self.stack} bytes of stack")
        if self.shared > MAX_SHARED:
            problems.append(f"{self.shared} bytes of shared memory")
        if tensor_cores and not self.wgmma + self.mma:
            problems.append("no tensor-core instruction")
        if self.early < 0:
            problems.append("does not wait for the previous kernel")
        elif early and not self.early:
            problems.append("loads no weight before the wait")
        return problems

    def regressions(self, before: dict[str, Any]) -> list[str]:
        """Figures that are worse than ``before``, by the same compiler."""
        worse = {"registers": 1, "shared": 1, "wgmma": -1, "mma": -1, "loads128": -1, "early": -1}
        now = asdict(self)
        return [
            f"{name} {before[name]} -> {now[name]}"
            for name, sign in worse.items()
            if sign * (now[name] - before[name]) > 0
        ]


@dataclass(frozen=True, slots=True)
class RecordedLaunch:
    """The kernel and the arguments, by name, of a launch that did not run."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def _recorded_launches() -> Iterator[list[RecordedLaunch]]:
    """Launches within the block are recorded, as on a device with PDL, and not run."""
    from triton.runtime.jit import JITFunction

    from s1engine.kernels import pdl

    launches: list[RecordedLaunch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        launches.append(RecordedLaunch(kernel, named, kwargs))

    with patch.object(JITFunction, "run", record), patch.object(pdl, "available", lambda: True):
        yield launches


def _source(launch: RecordedLaunch) -> Any:
    """Its source, specialized as a launch would: ones are constants and multiples of 16 are hints,
    except for arguments in do_not_specialize."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, aligned = "constexpr", False
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (type(value) is int and value == 1 and special):
            constants[(i,)] = value
        elif isinstance(value, int):
            kind = "i32" if abs(value) < 2**31 else "i64"
            aligned = special and value % 16 == 0
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind, aligned = "*" + TYPES[str(value.dtype)], value.data_ptr() % 16 == 0
        signature[parameter.name] = kind
        if aligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, hints)


def _compile(launch: RecordedLaunch) -> tuple[Compiled, str]:
    """The binary, and its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget

    binary = triton.compile(
        _source(launch), target=GPUTarget("cuda", 90, 32), options=launch.options
    )
    usage, code = _disassemble(binary.asm["cubin"])
    compiled = Compiled(
        kernel=launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        warps=binary.metadata.num_warps,
        stages=binary.metadata.num_stages,
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=binary.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA\b", code)),
        mma=len(re.findall(r"\bHMMA\b", code)),
        loads128=len(re.findall(r"\b(?:LDG|LDGSTS)\.[A-Z0-9.]*\b128\b", code)),
        early=_early(code),
    )
    return compiled, binary.asm["ptx"]


def _early(code: str) -> int:
    """Global loads and prefetches before ACQBULK, which waits for the previous kernel. -1 without
    it, or without PREEXIT, which lets the next kernel start."""
    before, wait, _ = code.partition("ACQBULK")
    if not wait or "PREEXIT" not in code:
        return -1
    return len(re.findall(r"\b(?:LDG|LDGSTS|CCTL)\.", before))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"cuobjdump did not print {pattern}"
    return int(match.group(1))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the tools in Triton's package."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run(
                [str(tools / tool), *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        ]
    return outputs[0], outputs[1]


def _report_case(name: str) -> list[tuple[str, Compiled, list[str]]]:
    """Label, binary and problems of every kernel that a case launches."""
    from s1engine.kernels.compile_cases import CASES

    case = CASES[name]
    with _recorded_launches() as launches:
        case.launch()
    binaries, ptx = zip(*(_compile(launch) for launch in launches), strict=True)
    missing = [f"no {part} in its PTX" for part in case.ptx if part not in ptx[-1]]
    products = [binary for binary in binaries if binary.kernel != "rms_norm"]
    rows = []
    for binary in binaries:
        demands = (case.tensor_cores, case.early) if binary is (products or binaries)[0] else ()
        label = name if len(launches) == 1 else f"{name}, {binary.kernel}"
        rows.append((label, binary, binary.problems(*demands)))
    rows[-1][2].extend(missing)
    return rows


def compile_cases(names: Sequence[str]) -> tuple[dict[str, Compiled], list[str]]:
    """The binaries of these cases by label, and their problems. Uses every core."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        cases = list(pool.map(_report_case, names))
    table, problems = {}, []
    for label, binary, found in (row for rows in cases for row in rows):
        table[label] = binary
        problems += [f"{label}: {problem}" for problem in found]
    return table, problems


def rows_of(names: Sequence[str], committed: dict[str, Any]) -> dict[str, Any]:
    """The rows of these cases; a case that launches several kernels has a row for each."""
    return {
        label: row
        for label, row in committed.items()
        if any(label == name or label.startswith(f"{name}, ") for name in names)
    }


def compare(table: dict[str, Compiled], committed: dict[str, Any]) -> list[str]:
    """Regressions against the table of the same compiler; a case on one side only is one."""
    problems = [f"{label}: not in the committed table" for label in table if label not in committed]
    problems += [f"{label}: gone" for label in committed if label not in table]
    for label in table.keys() & committed.keys():
        worse = table[label].regressions(committed[label])
        problems += [f"{label}: {change}" for change in worse]
    return sorted(problems)


def markdown(tables: dict[str, dict[str, Any]]) -> str:
    """The committed tables, one for each compiler, as a page."""
    lines = [
        "# Kernels compiled for sm_90",
        "",
        "Written by `make kernels-report ARGS=--write`: read from the binaries, not run on a GPU.",
        "A case is named after the kernel's function, then the model or shape. Cases were renamed",
        "with their functions in November 2026; the figures are unchanged.",
    ]
    names = [field.name for field in fields(Compiled) if field.name != "kernel"]
    for version, table in sorted(tables.items(), reverse=True):
        lines += ["", f"## Triton {version}", "", "| case | " + " | ".join(names) + " |"]
        lines.append("|---|" + "---:|" * len(names))
        for label, row in table.items():
            lines.append(f"| {label} | " + " | ".join(str(row[name]) for name in names) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make this the committed table")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th case only")
    args = parser.parse_args()
    if args.every < 1 or (args.every > 1 and args.write):
        parser.error("--every must be at least 1, and 1 with --write")
    import triton

    from s1engine.kernels.compile_cases import CASES

    names = list(CASES)[:: args.every]
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table, problems = compile_cases(names)
    rows = {label: asdict(binary) for label, binary in table.items()}
    if args.check and triton.__version__ in tables:
        problems += compare(table, rows_of(names, tables[triton.__version__]))
    if args.write:
        tables[triton.__version__] = rows
        RESULTS.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(tables, indent=1) + "\n")
        PAGE.write_text(markdown(tables))
    print(markdown({triton.__version__: rows}))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
