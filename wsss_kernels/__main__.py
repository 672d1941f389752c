"""`python -m wsss_kernels` says what this installation runs."""

from wsss_kernels.info import describe

if __name__ == "__main__":
    print(describe())
