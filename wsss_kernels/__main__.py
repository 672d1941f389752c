"""`python -m wsss_kernels` says what this installation runs."""

import os
import sys

from wsss_kernels.info import describe

if __name__ == "__main__":
    try:
        print(describe(), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
