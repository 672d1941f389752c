"""The `wsss` command itself: version, help, what is missing, how its threads wait."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("PIL")
from wsss_models.cli.main import main

import wsss_kernels as wk


def test_command_itself(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"wsss {wk.__version__}\n"
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert main(["--help"]) == 0
    assert main(["refine", "--help"]) == 0
    capsys.readouterr()

    def missing(name):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr("importlib.import_module", missing)
    assert main(["refine", "--images", "x"]) == 2
    assert capsys.readouterr().err == 'wsss refine needs PIL: pip install "wsss-kernels[cli]"\n'


def test_threads_that_wait_sleep(monkeypatch):
    """OpenMP reads that when torch is loaded: it must be said before, and what the user says stays."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    code = "import os, sys; from wsss_models.cli.main import main; main(['--help']); "
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "passive False"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "wsss_models", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout == f"wsss {wk.__version__}\n"
