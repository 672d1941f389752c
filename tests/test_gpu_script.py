"""benchmarks/gpu.sh where there is no GPU, and the small calls it gives to compute-sanitizer."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

if not SCRIPT.exists() or shutil.which("bash") is None:
    pytest.skip("needs bash and a checkout", allow_module_level=True)


def run(tmp_path, **environment) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), **environment}
    return subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_is_valid_bash():
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(SCRIPT, os.X_OK)


def test_says_that_there_is_no_gpu(tmp_path):
    done = run(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU: torch ") and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"PART": "bench speed"},
            "PART must name some of build test graph sanitize bench compile walk affinity boundary",
        ),
        ({"PYTHON": "python0"}, "python0 was not found"),
    ],
)
def test_refusals(tmp_path, environment, message):
    done = run(tmp_path, **environment)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.native
def test_the_small_calls_are_right(capsys):
    main = runpy.run_path(str(ROOT / "tests" / "every_kernel.py"))["main"]
    main(["affinity", "crf", "refine", "--device", "cpu"])
    assert "refine_cams" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["blur"])
