"""`wsss <command>`: finds the command, leaves the work to its module."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence

DONE, SOME_FAILED, WRONG_ARGUMENTS, INTERRUPTED, NOBODY_READS = 0, 1, 2, 130, 141

# Name -> what it does; the module of that name has add_arguments(parser) and run(arguments) -> exit code. Only the
# module of the command given is imported, so that `wsss --help` does not wait for torch.
COMMANDS = {
    "demo": "refine hand-drawn seeds on real photographs (or a click on your own) and write one picture of it",
    "data": "make a set of pictures with known masks, or look over one of your own",
    "evaluate": "compare label pictures or score maps with masks: IoU of every class, at every threshold",
    "train": "train a classifier, AffinityNet or IRNet on pictures with image-level labels, DeepLab on pseudo-labels",
    "cams": "class activation maps of a set of pictures by a trained network",
    "spread": "label pictures from maps that a trained AffinityNet or IRNet spreads over the objects",
    "segment": "label pictures by a trained segmentation network, several scales averaged, a dense CRF where wanted",
    "run": "a whole system in one folder: every stage from image-level labels to a segmentation network, one table",
    "ablate": "a system with each of its parts switched, trained beside each other, one table",
    "import": "CAMs that the published code pickled, to plain arrays, without running what is in them",
    "refine": "refine a folder of class activation maps to label pictures",
    "labels": "turn a folder of maps, coarse or refined, into label pictures, unsure pixels left out where wanted",
    "report": "one HTML page of a run, or of several side by side: scores, curves, best and worst pictures, settings",
}
_MODULES = {"import": "import_cams"}  # where the command's name cannot be a module's
_EXTRAS = {"PIL": "cli", "tqdm": "cli", "skimage": "demo", "lightning_fabric": "train"}


class UsageError(ValueError):
    """Arguments that parse but make no sense together: exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `wsss` command.

    Args:
        argv: the arguments after the name of the program; None = those of the process.

    Returns:
        int: 0 done, 1 some pictures failed (each named, the rest finished), 2 wrong arguments, 130 interrupted,
        141 when what reads the output has gone.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Read when torch is loaded. Its threads meet after every operation and by default turn in circles until the last is
    # there; on a machine that does other work too, or reads pictures meanwhile, that takes most of the time there is.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    command = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="wsss", description="Weakly-supervised segmentation from the command line.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    module = None
    try:
        for name, purpose in COMMANDS.items():
            sub = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
            if name == command:
                module = importlib.import_module(f"wsss_models.cli.{_MODULES.get(name, name)}")
                module.add_arguments(sub)
        arguments = parser.parse_args(argv)
        if arguments.version:
            print(f"wsss {importlib.import_module('wsss_kernels').__version__}", flush=True)
            return DONE
        if module is None:
            parser.print_help(sys.stderr)
            return WRONG_ARGUMENTS
        code: int = module.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse has printed why
        return stop.code if isinstance(stop.code, int) else WRONG_ARGUMENTS
    except UsageError as error:
        print(f"wsss {command}: error: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f'wsss {command} needs {error.name}: pip install "wsss-kernels[{extra}]"', file=sys.stderr)
        return WRONG_ARGUMENTS
    except BrokenPipeError:
        if not _reader_is_gone():  # a worker's pipe, say: a fault
            raise
        # `| head` has seen enough; nothing is left for the interpreter to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except KeyboardInterrupt:
        print(f"wsss {command}: interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
