"""`wsss refine`: what it makes again, and what a full disk, an interrupt or a kill leaves behind."""

import errno
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("PIL")
from wsss_models.cli import pictures
from wsss_models.data import artefacts

from tests.cli.refining import contents, make_set, refine


def test_only_what_is_missing_damaged_or_outdated_is_made_again(tmp_path, capsys):
    make_set(tmp_path, 6)
    assert refine(tmp_path, "--maps") == 0
    whole = contents(tmp_path / "out")
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "p00.png").unlink()
    (tmp_path / "out" / "p01.png").write_bytes(whole["p01.png"][:-5])
    (tmp_path / "out" / "p02.npz").write_bytes(whole["p02.npz"][:100])
    (tmp_path / "out" / f".wsss-{artefacts._host()}-{os.getpid()}-7.part").write_bytes(b"left behind")
    capsys.readouterr()
    assert refine(tmp_path, "--maps") == 0
    assert "3 written, 3 already done" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole
    unchanged = [n for n, t in stamps.items() if (tmp_path / "out" / n).stat().st_mtime_ns == t]
    assert sorted(unchanged) == ["p03.npz", "p03.png", "p04.npz", "p04.png", "p05.npz", "p05.png"]

    np.savez(tmp_path / "cams" / "p05.npz", class_ids=[9], cams=np.ones((1, 4, 4)))  # new input
    assert refine(tmp_path, "--maps") == 0
    assert "1 written, 5 already done" in capsys.readouterr().out
    assert refine(tmp_path, "--maps", "--background", "0.4") == 0  # new settings
    assert "6 written, 0 failed" in capsys.readouterr().out
    assert refine(tmp_path, "--background", "0.4") == 0  # labels alone: nothing to do
    assert "0 written, 6 already done" in capsys.readouterr().out


def test_full_disk(tmp_path, capsys, monkeypatch):
    make_set(tmp_path, 12)
    real, writes = artefacts._write_bytes, itertools.count()

    def fills_up(path, data):
        if next(writes) >= 5:
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(artefacts, "_write_bytes", fills_up)
    assert refine(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("error: the disk is full") == 1
    assert "failed:" not in error
    kept = contents(tmp_path / "out")
    assert len(kept) == 5
    assert all(artefacts.png_settings(tmp_path / "out" / name) for name in kept)
    monkeypatch.undo()
    assert refine(tmp_path) == 0
    assert "7 written, 5 already done" in capsys.readouterr().out


def test_interrupt(tmp_path, capsys, monkeypatch):
    make_set(tmp_path, 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "finish", interrupted)
    assert refine(tmp_path) == 130
    assert "continues where it stopped" in capsys.readouterr().err


# One process that has loaded everything but computed nothing forks a run per trial, and kills it.
KILLER = """
import contextlib, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from wsss_models.cli import refine
from wsss_models.cli.main import main
from wsss_models.data.artefacts import npz_settings, png_settings

root, trials = Path(sys.argv[1]), int(sys.argv[2])
arguments = ["refine", "--images", f"{root}/images", "--cams", f"{root}/cams", "--maps", "--out"]

def start(out):
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            os._exit(main([*arguments, str(out)]))
    return pid

def read(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")} if out.exists() else {}

assert os.waitpid(start(root / "whole"), 0)[1] == 0
whole = read(root / "whole")
random.seed(0)
killed = partial = 0
for trial in range(trials):
    out = root / f"trial{trial // 3}"  # three kills in a row on one folder
    wanted = random.randint(min(len(read(out)), len(whole) - 1), len(whole) - 1)  # files, perhaps one half written
    pid = start(out)
    status = None
    while status is None and len(list(out.iterdir()) if out.exists() else []) <= wanted:
        ended, code = os.waitpid(pid, os.WNOHANG)
        status = code if ended else None
    if status is None:
        time.sleep(random.uniform(0, 0.002))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    killed += os.WIFSIGNALED(status)
    found = read(out)
    partial += 0 < len(found) < len(whole)
    for name, data in found.items():
        assert data == whole[name], f"{name} is not complete"
        assert (png_settings if name.endswith("png") else npz_settings)(out / name)
    if trial % 3 == 2:
        assert os.waitpid(start(out), 0)[1] == 0
        assert read(out) == whole, "the final set differs"
        assert not [p for p in out.iterdir() if p.name.startswith(".")], "a temporary file is left"
print(killed, partial)
"""


@pytest.mark.native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_random_moments(tmp_path):
    make_set(tmp_path, 24)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "51"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    killed, partial = map(int, done.stdout.split())
    assert killed >= 17
    assert partial >= 8
