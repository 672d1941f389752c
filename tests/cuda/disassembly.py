"""The loops of a compiled kernel, and what instructions they hold: nvdisasm's listing of a .cubin, read."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Loop:
    first: int  # instruction of its kernel
    last: int  # the branch back
    counts: collections.Counter[str]  # opcode without its modifiers -> instructions, loops inside included

    def __len__(self) -> int:
        return self.last - self.first + 1


def nvdisasm() -> str | None:
    """The tool of the CUDA toolkit, or the one that comes with Triton."""
    found = shutil.which("nvdisasm")
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        for folder in triton.submodule_search_locations or ():
            found = shutil.which(Path(folder) / "backends/nvidia/bin/nvdisasm")
    return found


def listing(cubin: Path) -> str:
    tool = nvdisasm()
    assert tool is not None
    return subprocess.run([tool, f"{cubin}"], capture_output=True, text=True, check=True).stdout


def loops(text: str) -> dict[str, list[Loop]]:
    """Mangled name of a kernel -> its loops."""
    found: dict[str, list[Loop]] = {}
    for name, lines in _kernels(text).items():
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in lines:
            if match := re.match(r"(\.L\S+):", line):
                labels[match[1]] = len(instructions)
            elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
                instructions.append(match[1])
        found[name] = []
        for last, instruction in enumerate(instructions):
            target = re.match(r"BRA\b.*`\((\.L\S+)\)", instruction)
            first = labels.get(target[1], last) if target else last
            if first < last:
                opcodes = (each.split()[0].partition(".")[0] for each in instructions[first : last + 1])
                found[name].append(Loop(first, last, collections.Counter(opcodes)))
    return found


def _kernels(text: str) -> dict[str, list[str]]:
    kernels: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+(\S+?),", line):
            lines = kernels.setdefault(match[1].removeprefix(".text."), []) if ".text." in match[1] else []
        else:
            lines.append(line)
    return kernels
