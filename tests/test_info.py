"""What info() says about this installation, with and without the compiled module."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from wsss_kernels import _dispatch, ops
from wsss_kernels.info import DEVICES, DIRECTIONS, describe, info, op_names


def run_python(code: str, **environment: str) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_has_its_row():
    assert op_names() == list(ops.__all__), "an op without a reference of the same name"
    rows = info()["ops"]
    assert list(rows) == op_names()
    for devices in rows.values():
        assert tuple(devices) == DEVICES
        for directions in devices.values():
            assert tuple(directions) == DIRECTIONS
            for kernel in directions.values():
                assert kernel["kernel"] in ("native", "cuda", "triton", "reference", None)


def test_whatever_is_not_the_fastest_says_why():
    for op, devices in info()["ops"].items():
        for device, directions in devices.items():
            for direction, kernel in directions.items():
                slow = kernel["kernel"] in ("reference", None)
                assert bool(kernel["because"]) == slow, (op, device, direction, kernel)


def test_is_plain_data():
    assert json.loads(json.dumps(info())) == info()


def test_agrees_with_the_machine():
    found = info()
    assert found["torch"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["compiled"] == (_dispatch.native is not None)
    assert bool(found["not_compiled_because"]) != found["compiled"]
    assert bool(found["triton"]) != bool(found["no_triton_because"])
    assert bool(found["cuda"]["devices"]) != bool(found["cuda"]["because"])


@pytest.mark.native
def test_compiled_module_is_used_on_the_cpu():
    found = info()
    assert found["cpu"]["isa"] in ("baseline", "avx2", "avx512")
    for devices in found["ops"].values():
        assert devices["cpu"]["forward"] == {"kernel": "native", "because": ""}


@pytest.mark.native
def test_asks_for_less_than_the_processor_offers():
    code = "from wsss_kernels.info import info; print(info()['cpu']['isa'])"
    assert run_python(code, WSSS_CPU_ISA="baseline").strip() == "baseline"


def test_names_the_switch_that_hid_the_compiled_module():
    code = "import json; from wsss_kernels.info import info; print(json.dumps(info()))"
    found = json.loads(run_python(code, WSSS_DISABLE_NATIVE="1"))
    assert not found["compiled"]
    assert "WSSS_DISABLE_NATIVE" in found["not_compiled_because"]
    assert found["cpu"]["isa"] is None
    for devices in found["ops"].values():
        forward = devices["cpu"]["forward"]
        assert forward["kernel"] == "reference"
        assert "WSSS_DISABLE_NATIVE" in forward["because"]


def test_printed_for_people():
    text = describe()
    assert all(op in text for op in op_names())
    printed = subprocess.run([sys.executable, "-m", "wsss_kernels"], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines()[0] == text.splitlines()[0]
    assert len(printed.stdout.splitlines()) < 60
    assert printed.stderr == ""


def test_a_reader_that_goes_away():
    commands = [["-m", "wsss_kernels"]]
    if importlib.util.find_spec("wsss_models"):
        commands.append(["-c", "import sys; from wsss_models.cli.main import main; sys.exit(main())", "--version"])
    for command in commands:
        nobody, write = os.pipe()
        os.close(nobody)
        with os.fdopen(write) as output:
            done = subprocess.run(
                [sys.executable, *command], stdout=output, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.stderr == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_importing_leaves_cuda_alone():
    code = "import torch, wsss_kernels; print(torch.cuda.is_initialized())"
    assert run_python(code).strip() == "False"


@pytest.mark.native
def test_a_missing_gpu_is_an_error_not_a_crash():
    native = _dispatch.native
    if not native.cuda_archs:
        pytest.skip("built without CUDA")
    major = native.cuda_runtime_version() // 1000
    assert major >= 11
    devices, message = native.cuda_device_count()
    assert (devices == 0) == bool(message)
    if devices == 0:
        with pytest.raises(RuntimeError, match=r"CUDA driver|no CUDA-capable device"):
            native.cuda_probe()
    else:
        capability = torch.cuda.get_device_capability()
        assert native.cuda_probe() <= 10 * capability[0] + capability[1]
