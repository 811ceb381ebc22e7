"""A disk that is full, or may not be written: one line, nothing half written left, and the run goes on after."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch

import smartlab as sl
from smartlab.core.errors import DataError
from smartlab.core.files import written
from smartlab.interop.weights import export
from smartlab.training import checkpoint
from tests.attack.test_workers import command, pretrain_words
from tests.processes import Child
from tests.training.conftest import cohort, settings  # noqa: F401  fixtures
from tests.training.test_resume import assert_same_run, train


def full_at(size, words):
    """The command line where no file may be larger than `size` bytes, which libraries meet as they meet a full disk."""
    sys.dont_write_bytecode = (
        True  # Python would put the beginning of a compiled module in place of all of it
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    command(words)


def test_a_checkpoint_that_does_not_fit_is_one_line_and_leaves_nothing_behind(settings, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    child = Child(full_at, 60_000, pretrain_words(settings, out))
    assert child.wait(120) == 1
    assert "a checkpoint could not be written" in child.said and "GB free" in child.said, child.said
    assert "Traceback" not in child.said
    assert [p for p in (out / "checkpoints").rglob("*") if p.is_file()] == []
    again = Child(train, settings, out)
    assert again.wait() == 0 and checkpoint.steps(out)[-1] == 8, again.said


@pytest.mark.parametrize("to", ["monai", "safetensors"])
def test_an_export_that_does_not_fit_leaves_the_one_before(tmp_path, to, monkeypatch):
    from smartlab.models.build import make_encoder

    encoder = make_encoder(sl.load_config("tiny"))
    file = export(encoder, to, tmp_path / "e")
    before = file.read_bytes()

    def full(content, place, *more):
        Path(place).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0\nmore lines")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        DataError, match=r"the export could not be written .*unexpected pos 64 vs 0;.*GB free"
    ):
        export(encoder, to, file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("to", ["monai", "safetensors"])
@pytest.mark.parametrize("place", ["/proc/e.pt", "file/e.pt"])
def test_an_export_to_where_nothing_may_be_written_is_one_error(tmp_path, to, place, monkeypatch):
    from smartlab.models.build import make_encoder

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(DataError, match="the export could not be written"):
        export(make_encoder(sl.load_config("tiny")), to, place)


def test_what_is_interrupted_leaves_nothing_and_keeps_what_was(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyboardInterrupt), written(tmp_path / "a", "a file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(settings, tmp_path, capsys):  # noqa: F811
    config = sl.load_config("tiny", settings | {"train.checkpoint_every": 2, "train.keep_last": 1})
    sl.pretrain(config, tmp_path / "whole", progress=False)
    sl.pretrain(
        sl.load_config("tiny", settings | {"train.checkpoint_every": 2}), tmp_path / "run", progress=False
    )
    newest = checkpoint.folder(tmp_path / "run", 8)
    content = bytearray((newest / "teacher.safetensors").read_bytes())
    content[-5] ^= 4
    (newest / "teacher.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="another content than was written"):
        sl.Run(tmp_path / "run").encoder()
    run = sl.pretrain(config, tmp_path / "run", resume=True, progress=False)
    assert (
        "step-000008 cannot be read and was set aside: the run goes on from step 6" in capsys.readouterr().err
    )
    assert "damaged checkpoint" in [event["event"] for event in run.events]
    assert checkpoint.steps(run.path) == [8] and run.finished
    assert_same_run(tmp_path / "whole", run.path, 8)
    assert (run.path / "checkpoints" / "damaged-step-000008").is_dir()


def test_what_the_system_lacks_is_no_damage_to_a_checkpoint(tmp_path, monkeypatch):
    weights = {"student.encoder.a": torch.zeros(3), "b": torch.zeros(3)}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, weights, {}, {})
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            checkpoint.load_weights(checkpoint.folder(tmp_path, 2) / "student.safetensors")
        with pytest.raises(OSError, match="Too many open files"):
            checkpoint.newest_whole(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with monkeypatch.context() as patch:
        full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        patch.setattr(torch, "load", lambda *given, **more: (_ for _ in ()).throw(full))
        with pytest.raises(MemoryError):
            checkpoint.newest_whole(tmp_path)
    (checkpoint.folder(tmp_path, 2) / "student.safetensors").unlink()
    assert checkpoint.newest_whole(tmp_path)[2] == [checkpoint.folder(tmp_path, 2)]


def test_without_a_whole_checkpoint_resuming_says_which_is_damaged(settings, tmp_path):  # noqa: F811
    config = sl.load_config("tiny", settings | {"train.steps": 4, "train.checkpoint_every": 2})
    sl.pretrain(config, tmp_path / "run", progress=False)
    for step in (2, 4):
        (checkpoint.folder(tmp_path / "run", step) / "state.pt").write_bytes(b"")
    with pytest.raises(DataError, match=r"step-000004: the checkpoint cannot be read"):
        sl.pretrain(config, tmp_path / "run", resume=True, progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
