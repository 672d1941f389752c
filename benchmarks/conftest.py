"""`pytest benchmarks --benchmark-only`: collects bench_*.py and gives their tests every case and way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("WSSS_REQUIRE_NATIVE", "1")  # nothing is timed that fell back to the reference


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None  # pytest itself collects a file that was named


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "way"} <= set(metafunc.fixturenames):
        cases = [case for case in metafunc.module.CASES if case.timed and not case.only_full]
        chosen = [(case, way) for case in cases for way in case.ways]
        metafunc.parametrize(("case", "way"), chosen, ids=[f"{case.name}-{way.name}" for case, way in chosen])


@pytest.fixture(autouse=True)
def leave_out(request: pytest.FixtureRequest) -> None:
    from benchmarks.measure import skip_reason

    if "way" not in request.fixturenames:
        return
    reason = skip_reason(request.getfixturevalue("way"), full=False)
    if reason:
        pytest.skip(reason)
