"""Builds the compiled core with CMake; everything else about the package is in pyproject.toml.

Environment: WSSS_CUDA=AUTO|ON|OFF, WSSS_CUDA_ARCHS=80-real,90-real,90-virtual, WSSS_WERROR=1, CMAKE_ARGS (more
arguments), CMAKE_BUILD_PARALLEL_LEVEL, CXX, CUDACXX, CUDA_HOME.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILER_VARIABLES = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDA_HOME")


def find_tool(name: str) -> str | None:
    """On PATH, else beside the interpreter: the virtual environment may be in use without being activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def cmake_arguments() -> list[str]:
    try:
        import pybind11
    except ImportError:
        sys.exit("pybind11 is missing: pip install pybind11 cmake ninja, or build without --no-build-isolation")
    arguments = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DWSSS_CUDA={os.environ.get('WSSS_CUDA', 'AUTO')}",
        # A list's semicolons would end a shell command; CMakeLists.txt takes commas.
        f"-DWSSS_CUDA_ARCHS={os.environ.get('WSSS_CUDA_ARCHS', '').replace(';', ',')}",
        f"-DWSSS_WERROR={os.environ.get('WSSS_WERROR', 'OFF')}",
    ]
    if ninja := find_tool("ninja"):
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def forget_other_configuration(build_dir: Path, configuration: str) -> None:
    """CMake's cache outlives the tools it names (pip's isolated builds live in a folder that is gone) and keeps the
    first answer to most options. Objects stay: they are compiled again where their command changed."""
    record = build_dir / "configuration.txt"
    if not record.exists() or record.read_text(encoding="utf-8") != configuration:
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        for found in (*build_dir.glob("CMakeFiles/[0-9]*"), build_dir / "CMakeFiles" / "pkgRedirects"):
            shutil.rmtree(found, ignore_errors=True)
    build_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(configuration, encoding="utf-8")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake = find_tool("cmake")
        if cmake is None:
            sys.exit("cmake is missing: pip install cmake ninja, or build without --no-build-isolation")
        configure = [cmake, "-S", str(ROOT), *cmake_arguments()]
        variables = [f"{name}={os.environ.get(name, '')}" for name in COMPILER_VARIABLES]
        build_dir = ROOT / "build" / str(sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag)
        forget_other_configuration(build_dir, "\n".join([*configure, *variables]))

        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        for command in ([*configure, "-B", str(build_dir)], [cmake, "--build", str(build_dir), "--parallel", jobs]):
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"{shlex.join(command)} failed; the reason is above")
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        # Beside it first, then renamed over it: a process that runs the old module keeps it whole.
        arriving = module.with_name(module.name + ".new")
        shutil.copyfile(build_dir / module.name, arriving)
        arriving.replace(module)


setup(ext_modules=[Extension("wsss_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild}, zip_safe=False)
