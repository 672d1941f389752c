"""What is shipped, what importing it does, and what the compiled objects may and may not hold."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import wsss_kernels
from wsss_kernels import _dispatch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a checkout")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("wsss-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("imported from the checkout without being installed")


def test_one_version(distribution):
    declared = [
        ast.literal_eval(statement.value)
        for statement in ast.parse((ROOT / "wsss_kernels" / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "__version__"
    ]
    assert declared == [wsss_kernels.__version__] == [distribution.version]
    assert f"## {wsss_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_depends_on_torch_and_numpy_only(distribution):
    assert sorted(re.match(r"[\w-]+", line)[0] for line in distribution.requires if "extra ==" not in line) == [
        "numpy",
        "torch",
    ]


def test_command_is_installed(distribution):
    (command,) = distribution.entry_points.select(group="console_scripts")
    assert command.name == "wsss"
    assert command.value == "wsss_models.cli.main:main"
    assert callable(command.load())


def test_type_information_is_shipped():
    assert (Path(wsss_kernels.__file__).parent / "py.typed").exists()


# What torch itself imports is not ours; so torch goes first. A socket opened by anybody would raise.
IMPORT = """
import socket, sys, time
import numpy, torch
before = set(sys.modules)
def refuse(*arguments, **options):
    raise AssertionError("importing wsss_kernels opened a socket")
socket.socket = socket.create_connection = refuse
start = time.perf_counter()
import wsss_kernels
print(time.perf_counter() - start)
for name in sorted({name.partition(".")[0] for name in set(sys.modules) - before}):
    print(name)
"""


def test_import_stays_within_torch_and_numpy(record_property, tmp_path):
    seconds, *modules = run(sys.executable, "-c", IMPORT, cwd=tmp_path).split()
    record_property("import_seconds_beyond_torch", float(seconds))
    print(f"import beyond torch: {float(seconds):.3f} s")
    foreign = set(modules) - set(sys.stdlib_module_names) - {"wsss_kernels", "torch", "numpy"}
    assert not {name for name in foreign if not name.startswith("__editable__")}
    assert not {"PIL", "skimage", "scipy", "triton", "wsss_models"} & set(modules)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    pytest.importorskip("pybind11")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    # A copy: setuptools writes its egg-info beside the sources.
    tree = out / "tree"
    kept_out = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tree, ignore=kept_out)
    run(sys.executable, "-c", code, cwd=tree)
    (archive,) = out.glob("*.tar.gz")
    return archive


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = [
        str(path.relative_to(ROOT))
        for folder in ("csrc", "wsss_kernels", "python", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in {".cpp", ".h", ".cu", ".py", ".typed"}
    ]
    assert len(tracked) > 20
    top = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "NOTICE", "CHANGELOG.md", "constraints.txt"}
    assert not (top | set(tracked)) - names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "/build/" in name or ".venv" in name]


@pytest.mark.release
def test_builds_offline_and_twice_the_same(sdist, tmp_path):
    wheels = []
    for attempt in ("first", "second"):
        out = tmp_path / attempt
        with tarfile.open(sdist) as archive:
            archive.extractall(out, filter="data")
        (tree,) = out.iterdir()
        wheel = (
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-index",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            str(out),
        )
        run(*wheel, str(tree), WSSS_CUDA="OFF", SOURCE_DATE_EPOCH="1700000000")
        (built,) = out.glob("*.whl")
        wheels.append(built)
    with zipfile.ZipFile(wheels[0]) as first, zipfile.ZipFile(wheels[1]) as second:
        names = first.namelist()
        assert names == second.namelist()
        assert not [name for name in names if first.read(name) != second.read(name)]
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"wsss_kernels", "wsss_models", f"wsss_kernels-{wsss_kernels.__version__}.dist-info"}
    for shipped in ("wsss_kernels/py.typed", "wsss_models/cli/main.py", "licenses/LICENSE", "licenses/NOTICE"):
        assert [name for name in names if name.endswith(shipped)], shipped
    assert [name for name in names if re.fullmatch(r"wsss_kernels/_C\..*so", name)]


def symbols(*arguments: str) -> list[tuple[str, str]]:
    """(type, name) of every symbol, names demangled. Upper case types can be seen by other objects."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    lines = run("nm", "--demangle", *arguments).splitlines()
    found = (re.match(r"(?:[0-9a-f]+| ) +(\w) (.+)", line) for line in lines)
    return [(match[1], match[2]) for match in found if match]


@pytest.mark.native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_kernels_lend_nothing_to_older_processors(isa):
    """The linker keeps one of several weak copies: one compiled for AVX-512 would be run by every processor."""
    objects = sorted(BUILD.glob(f"*/CMakeFiles/kernels_{isa}.dir/**/*.o"))
    if not objects:
        pytest.skip("no build folder, or no such instruction set on this processor")
    lent, run_at_start = [], []
    for path in objects:
        for kind, name in symbols(str(path)):
            if (kind.isupper() or kind in "uvw") and kind != "U" and f"wsss::{isa}::" not in name:
                lent.append((path.name, kind, name))
            if "_GLOBAL__sub_I" in name or "__cxx_global_var_init" in name or "global constructors" in name:
                run_at_start.append((path.name, name))
    assert not lent
    assert not run_at_start, "a dynamic initialiser runs on every processor"


@pytest.mark.native
def test_compiled_module_shows_only_its_entry():
    """Were our CUDA runtime visible, torch's libraries could be linked to it, or we to theirs."""
    shown = {name for kind, name in symbols("--dynamic", "--defined-only", _dispatch.native.__file__) if kind in "TDBR"}
    assert shown == {"PyInit__C"}


@pytest.mark.native
def test_compiled_module_needs_no_torch():
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    needed = run("ldd", _dispatch.native.__file__)
    assert not re.search(r"torch|c10|libcuda", needed), needed


def configure(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    pybind11 = pytest.importorskip("pybind11")
    command = ("cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options)
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_cuda_asked_for_but_missing_is_an_error(tmp_path):
    done = configure(tmp_path, "-DWSSS_CUDA=ON", CUDACXX="/nowhere/nvcc")
    assert done.returncode != 0
    assert "WSSS_CUDA=ON, but no working nvcc found" in done.stderr


def test_cuda_missing_is_a_notice(tmp_path):
    done = configure(tmp_path, CUDACXX="/nowhere/nvcc")
    assert done.returncode == 0, done.stderr
    assert "building WITHOUT CUDA kernels" in " ".join(done.stderr.split())


def test_cmake_by_hand_and_an_nvcc_too_old(tmp_path):
    done = configure(tmp_path, "-G", "Unix Makefiles")
    assert done.returncode == 0, done.stderr
    compilers = list(tmp_path.glob("CMakeFiles/*/CMakeCUDACompiler.cmake"))
    if not compilers:
        pytest.skip("no nvcc")
    found = re.sub(r'(CMAKE_CUDA_COMPILER_VERSION) "[0-9.]+"', r'\1 "11.5.119"', compilers[0].read_text())
    compilers[0].write_text(found)
    done = configure(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "CUDA 11.5.119, 11.8 or newer is needed: building WITHOUT CUDA kernels" in " ".join(done.stderr.split())
    done = configure(tmp_path, "-DWSSS_CUDA=ON")
    assert done.returncode != 0 and "CUDA 11.5.119" in done.stderr


@pytest.mark.parametrize("option", ["-DWSSS_CUDA=perhaps", "-DWSSS_CUDA_ARCHS=sm_90"])
def test_misspelt_options_are_named(tmp_path, option):
    done = configure(tmp_path, option)
    if "WITHOUT CUDA" in done.stderr:
        pytest.skip("no nvcc, so the architectures are not looked at")
    assert done.returncode != 0
    assert option.removeprefix("-D").partition("=")[0] + " must be" in done.stderr
