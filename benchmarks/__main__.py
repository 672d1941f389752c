"""`python -m benchmarks` (the speed table), `python -m benchmarks quality --data DIR`, `python -m benchmarks plot`."""

from __future__ import annotations

import sys

from benchmarks import plot, quality, run

COMMANDS = {"run": run.main, "quality": quality.main, "plot": plot.main}


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:]) or 0
    return run.main(argv) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
