"""`python -m benchmarks` (the speed table), and its subcommands `quality`, `systems`, `plot`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("run", "quality", "systems", "plot")  # a module each, imported when it is asked for


def main(argv: list[str]) -> int:
    name, words = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("run", argv)
    return importlib.import_module(f"benchmarks.{name}").main(words) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
