"""Checkpoints: any world writes, any reads, bits alike; damage is seen; nothing whole is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pretrain.checkpoint import (
    CheckpointDiskError,
    CheckpointError,
    CheckpointWriter,
    Fragment,
    commit,
    find_latest,
    open_checkpoint,
    open_store,
    slice_for_rank,
)
from pretrain.errors import UserError
from tests.ranks import run_ranks
from tests.saves import META, bits, check, make_state, save


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_any_world_reads_what_any_world_wrote(tmp_path: Path, world: int) -> None:
    state = make_state()
    save(tmp_path, 100, state, world, file_limit=1 << 10)  # small files, so that tensors are cut inside a rank too
    checkpoint = open_checkpoint(tmp_path / "step_00000100")
    check(checkpoint, state)
    checkpoint.verify()
    assert (checkpoint.step, checkpoint.world, checkpoint.meta) == (100, world, META)
    for reader_world in (1, 2, 3, 5):
        for rank in range(reader_world):
            for f in slice_for_rank(state, rank, reader_world):
                read = checkpoint.read_range(f.name, f.offset, f.offset + f.data.numel())
                assert bits(read) == bits(f.data), (f.name, f.offset)


def test_random_ranges(tmp_path: Path) -> None:
    x = torch.arange(10_000, dtype=torch.int32)
    save(tmp_path, 1, {"x": x}, 3, file_limit=1 << 10)
    checkpoint, rng = find_latest(tmp_path), np.random.default_rng(0)
    for _ in range(200):
        lo, hi = sorted(rng.integers(0, 10_001, 2).tolist())
        assert torch.equal(checkpoint.read_range("x", lo, hi), x[lo:hi])
    with pytest.raises(CheckpointError, match=r"\[5, 10001\)"):
        checkpoint.read_range("x", 5, 10_001)


def test_a_range_reads_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, {"x": torch.zeros(1_000_000)})
    checkpoint, read, real = find_latest(tmp_path), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: read.append(real(fd, bufs, at)) or read[-1])
    checkpoint.read_range("x", 500_000, 500_010)
    assert sum(read) == 40


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    state = make_state()
    save(tmp_path, 1, state, 2)
    found: dict[str, list] = {}
    for file in tmp_path.glob("step_*/data-*.safetensors"):
        for key, data in safetensors.torch.load_file(file).items():
            name, offset = key.rsplit("@", 1)
            found.setdefault(name, []).append((int(offset), data))
    for name, tensor in state.items():
        pieces = [d for _, d in sorted(found[name], key=lambda p: p[0])]
        assert b"".join(bits(p) for p in pieces) == bits(tensor)
    manifest = json.loads((tmp_path / "step_00000001/manifest.json").read_text())
    assert {"step", "meta", "tensors", "files"} <= manifest.keys()


def test_slices_are_equal_and_every_element_once() -> None:
    state = make_state()
    total = sum(t.numel() for t in state.values())
    for world in (1, 2, 3, 7, 64):
        seen: dict[str, int] = {}
        for rank in range(world):
            fragments = slice_for_rank(state, rank, world)
            assert abs(sum(f.data.numel() for f in fragments) - total / world) < 1
            for f in fragments:
                assert seen.get(f.name, 0) == f.offset
                seen[f.name] = f.offset + f.data.numel()
        assert seen == {n: t.numel() for n, t in state.items()}


def _write_as_rank(rank: int, world: int, root: str) -> int:
    writer = CheckpointWriter(Path(root), rank=rank, world=world, attempt="z", timeout_s=30)
    for step in (1, 2, 3):
        writer.save(step, slice_for_rank(make_state(step), rank, world), META)
    writer.wait()
    return -1 if writer.committed is None else writer.committed


def test_real_ranks_side_by_side(tmp_path: Path) -> None:
    assert run_ranks(_write_as_rank, 3, str(tmp_path)) == [3, -1, -1]
    for step in (1, 2, 3):
        checkpoint = open_checkpoint(tmp_path / f"step_{step:08d}")
        checkpoint.verify()
        check(checkpoint, make_state(step))
    assert not list(tmp_path.glob("*/part-*"))
    assert not list(tmp_path.glob("*/*.tmp"))


def test_training_may_go_on_at_once(tmp_path: Path) -> None:
    state = {"x": torch.zeros(3_000_000)}
    writer = CheckpointWriter(tmp_path, attempt="a")
    writer.reserve(slice_for_rank(state, 0, 1))
    for step in (1, 2, 3):
        state["x"].fill_(step)
        writer.save(step, slice_for_rank(state, 0, 1), {})
        state["x"].fill_(-1)  # the next training step
    writer.wait()
    for step in (1, 2, 3):
        assert (open_checkpoint(tmp_path / f"step_{step:08d}").read("x") == step).all()


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    """Rank 0 cannot commit before rank 1's part comes, so its next save must stand still until then."""
    state = make_state()
    zero = CheckpointWriter(tmp_path, rank=0, world=2, attempt="a")
    one = CheckpointWriter(tmp_path, rank=1, world=2, attempt="a")
    zero.save(1, slice_for_rank(state, 0, 2), {})
    second = threading.Thread(target=lambda: zero.save(2, slice_for_rank(state, 0, 2), {}))
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    one.save(1, slice_for_rank(state, 1, 2), {})
    second.join(10)
    assert not second.is_alive()
    assert zero.committed == 1
    one.save(2, slice_for_rank(state, 1, 2), {})
    zero.wait()
    assert zero.committed == 2


def test_closing_lets_the_save_going_on_become_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends just after a save ends its thread too."""
    writer = CheckpointWriter(tmp_path, attempt="a")
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.1))
    writer.save(1, slice_for_rank(make_state(), 0, 1), {})
    writer.close()
    assert find_latest(tmp_path).step == 1

    alone = CheckpointWriter(tmp_path, world=2, attempt="b")
    alone.save(2, slice_for_rank(make_state(), 0, 2), {})
    begin = time.monotonic()
    alone.close(timeout_s=0.2)  # the other rank is dead
    assert time.monotonic() - begin < 5


def test_who_waits_for_a_save_gives_signs_of_life(tmp_path: Path) -> None:
    """For as long as a save may take; then a wait is a standstill."""
    alone = CheckpointWriter(tmp_path, world=2, attempt="a", timeout_s=1.5)  # the other rank never comes
    alone.save(1, slice_for_rank(make_state(), 0, 2), {})
    beats: list[float] = []
    with pytest.raises(CheckpointError, match="ranks 1"):
        alone.wait(lambda: beats.append(time.monotonic()))
    assert len(beats) == 2
    assert 0.9 < beats[1] - beats[0] < 1.4


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1, make_state())
    writer = CheckpointWriter(tmp_path, rank=0, world=4, attempt="b", timeout_s=0.05)
    CheckpointWriter(tmp_path, rank=2, world=4, attempt="b").save(2, slice_for_rank(make_state(), 2, 4), {})
    writer.save(2, slice_for_rank(make_state(), 0, 4), {})
    with pytest.raises(CheckpointError, match=r"parts of 2 of 4 ranks are missing \(ranks 1, 3; attempt b\)"):
        writer.wait()
    assert find_latest(tmp_path).step == 1


def test_a_late_rank_of_an_old_attempt_completes_nothing(tmp_path: Path) -> None:
    old, new = make_state(1), make_state(2)
    late = CheckpointWriter(tmp_path, rank=1, world=2, attempt="old")
    zero = CheckpointWriter(tmp_path, rank=0, world=2, attempt="new", timeout_s=0.1)
    late.save(5, slice_for_rank(old, 1, 2), {})
    late.wait()
    zero.save(5, slice_for_rank(new, 0, 2), {})
    with pytest.raises(CheckpointError, match="ranks 1"):
        zero.wait()
    assert find_latest(tmp_path) is None


def test_two_attempts_interleaved(tmp_path: Path) -> None:
    """Both write the same step at the same time; each commit is whole, and the later one holds."""
    states = {"old": make_state(1), "new": make_state(2)}
    writers = {(a, r): CheckpointWriter(tmp_path, rank=r, world=2, attempt=a) for a in states for r in range(2)}
    for key in [("old", 1), ("new", 1), ("old", 0)]:
        writers[key].save(7, slice_for_rank(states[key[0]], key[1], 2), {"of": key[0]})
        writers[key].wait()
    checkpoint = open_checkpoint(tmp_path / "step_00000007")
    assert checkpoint.meta == {"of": "old"}
    check(checkpoint, states["old"])
    writers["new", 0].save(7, slice_for_rank(states["new"], 0, 2), {"of": "new"})
    writers["new", 0].wait()
    checkpoint = open_checkpoint(tmp_path / "step_00000007")
    checkpoint.verify()
    assert checkpoint.meta == {"of": "new"}
    check(checkpoint, states["new"])
    assert not list(tmp_path.glob("*/*-old-*")), "what was replaced is cleared away"


def test_a_start_sweeps_what_others_left_torn(tmp_path: Path) -> None:
    save(tmp_path, 1, make_state(), attempt="a")
    whole = sorted((tmp_path / "step_00000001").iterdir())
    CheckpointWriter(tmp_path, rank=1, world=2, attempt="b").save(2, slice_for_rank(make_state(), 1, 2), {})
    time.sleep(0.2)
    (tmp_path / "step_00000001/notes.txt").write_text("mine")
    CheckpointWriter(tmp_path, rank=0, world=2, attempt="c")
    assert not (tmp_path / "step_00000002").exists()
    assert set(whole) < set((tmp_path / "step_00000001").iterdir())
    assert (tmp_path / "step_00000001/notes.txt").exists()


def test_parts_must_cover_every_element_once(tmp_path: Path) -> None:
    x = torch.arange(10.0)

    def piece(lo: int, hi: int, **change) -> Fragment:
        return Fragment(**{"name": "x", "shape": (10,), "dtype": x.dtype, "offset": lo, "data": x[lo:hi]} | change)

    cases = {
        r"elements \[4, 6\) are missing": [piece(0, 4), piece(6, 10)],
        r"elements \[9, 10\) are missing": [piece(0, 9)],
        r"elements \[2, 5\) were written twice": [piece(0, 5), piece(2, 10)],
        "given twice": [piece(0, 5), piece(0, 5)],
        "outside": [piece(0, 10, offset=1)],
        "must be flat": [piece(0, 10, data=x.view(2, 5))],
        "not torch.float16": [piece(0, 10, dtype=torch.float16)],
        "cannot be stored": [piece(0, 10, dtype=torch.complex64, data=x.to(torch.complex64))],
        "disagree": [piece(0, 5), piece(5, 10, shape=(5, 2))],
    }
    for step, (message, fragments) in enumerate(cases.items()):
        writer = CheckpointWriter(tmp_path, attempt="a")
        with pytest.raises(CheckpointError, match=f"'x'.*{message}"):  # noqa: PT012
            writer.save(step, fragments, {})
            writer.wait()
    for rank, shape in ((1, (10,)), (0, (5, 2))):
        writer = CheckpointWriter(tmp_path, rank=rank, world=2, attempt="b")
        writer.save(50, [piece(rank * 5, rank * 5 + 5, shape=shape)], {})
    with pytest.raises(CheckpointError, match="the ranks disagree about tensor 'x'"):
        writer.wait()
    assert find_latest(tmp_path) is None


def test_callers_mistakes_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep_last=0"):
        CheckpointWriter(tmp_path, attempt="a", keep_last=0)
    with pytest.raises(CheckpointError, match="letters and digits"):
        CheckpointWriter(tmp_path, attempt="a-1")
    writer = CheckpointWriter(tmp_path, attempt="a")
    with pytest.raises(ValueError, match="JSON"):
        writer.save(1, [], {"loss": float("nan")})
    writer.save(4, slice_for_rank(make_state(), 0, 1), {})
    writer.save(4, [], {})  # the same step again: the first stands
    with pytest.raises(CheckpointError, match="new attempt"):
        writer.save(3, [], {})
    assert len(find_latest(tmp_path).names()) == len(make_state())
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nope'"):
        find_latest(tmp_path).read("model.nope")
    assert issubclass(CheckpointError, UserError)


def test_nothing_there(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None


# --- damage


def data_files(root: Path, step: int) -> list[Path]:
    return sorted(root.glob(f"step_{step:08d}/data-*"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def swap(a: Path, b: Path) -> None:
    keep = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(keep)


DAMAGE = {
    "cut data": (lambda r: data_files(r, 2)[0].write_bytes(data_files(r, 2)[0].read_bytes()[:-1]), False),
    "data gone": (lambda r: data_files(r, 2)[1].unlink(), False),
    "manifest gone": (lambda r: (r / "step_00000002/manifest.json").unlink(), False),
    "manifest cut": (lambda r: (r / "step_00000002/manifest.json").write_text('{"format":'), False),
    "manifest empty": (lambda r: (r / "step_00000002/manifest.json").write_text(""), False),
    "manifest not ours": (lambda r: (r / "step_00000002/manifest.json").write_text("[]"), False),
    "manifest flipped": (lambda r: flip(r / "step_00000002/manifest.json", 400), False),
    "bytes flipped": (lambda r: flip(data_files(r, 2)[1], -100), True),
    "header flipped": (lambda r: flip(data_files(r, 2)[1], 60), True),
    "header length flipped": (lambda r: flip(data_files(r, 2)[1], 6), True),
    "ranks swapped": (lambda r: swap(*data_files(r, 2)[:2]), True),
    "steps swapped": (lambda r: swap(data_files(r, 1)[0], data_files(r, 2)[0]), True),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_the_one_before_is_used(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    state = {"x": torch.randn(1000), "y": torch.randn(1000)}  # two ranks, two files of one size
    save(tmp_path, 0, state, 2)
    save(tmp_path, 1, state, 2)
    save(tmp_path, 2, state, 2)
    damage, only_verify_sees = DAMAGE[kind]
    damage(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = find_latest(tmp_path, verify=True)
    assert "passed over" in caplog.text
    assert "step_00000002" in caplog.text
    assert found.step == (0 if kind == "steps swapped" else 1)
    check(found, state)
    if only_verify_sees:
        with pytest.raises(CheckpointError, match="another checkpoint"):  # a load does not take it for good either
            [open_checkpoint(tmp_path / "step_00000002").read(n) for n in state]
    else:
        assert find_latest(tmp_path).step == 1


def test_any_flipped_byte_is_seen_or_harmless(tmp_path: Path) -> None:
    x = torch.randn(16)
    save(tmp_path, 1, {"x": x, "n": torch.tensor(3)}, 2)
    checked = 0
    for path in sorted((tmp_path / "step_00000001").iterdir()):
        good = path.read_bytes()
        for place in range(0, len(good), 3):
            flip(path, place)
            found = find_latest(tmp_path, verify=True)
            if found is not None:  # in a label that nothing relies on, or in the space that pads a header
                assert path.name.startswith("data-")
                assert torch.equal(found.read("n"), torch.tensor(3))
                assert torch.equal(found.read("x"), x)
            path.write_bytes(good)
            checked += 1
    assert checked > 300


# --- a full disk, and what is kept


def steps(root: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in root.glob("step_*"))


def fail_then_recover(root: Path, error: int, make_room, file_limit: int = 1 << 30) -> None:
    """Step 2 cannot be written; step 1 stays; step 3 succeeds once there is room, and the torn step 2 is
    gone.
    """
    small, large = {"x": torch.ones(1000)}, {"x": torch.ones(2_000_000)}
    writer = CheckpointWriter(root, attempt="a", file_limit=file_limit)
    writer.save(1, slice_for_rank(small, 0, 1), META)
    writer.wait()
    writer.save(2, slice_for_rank(large, 0, 1), META)
    with pytest.raises(CheckpointDiskError, match=rf"needs {min(8_000_000, file_limit) // 1000:,},\d+ bytes") as caught:
        writer.save(3, slice_for_rank(small, 0, 1), META)
    assert caught.value.errno == error
    assert caught.value.filename.startswith(str(root / "step_00000002/data-a-00000"))
    assert isinstance(caught.value, OSError)
    check(find_latest(root, verify=True), small)
    assert not data_files(root, 2), "the room is given back"
    make_room()
    writer.save(3, slice_for_rank(large, 0, 1), META)
    writer.wait()
    check(find_latest(root, verify=True), large)
    assert steps(root) == [1, 3]


def test_a_file_size_limit_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
        fail_then_recover(tmp_path, errno.EFBIG, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a small file system")
    try:
        (disk / "other.bin").write_bytes(bytes(8_000_000))
        fail_then_recover(disk / "checkpoints", errno.ENOSPC, (disk / "other.bin").unlink, file_limit=1 << 20)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: memoryview) -> int:
        raise OSError(errno.EIO, "broken disk")

    folder = open_store(tmp_path)
    folder.write("f", [b"old"])
    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(CheckpointDiskError, match="broken disk"):
        folder.write("f", [b"new"])
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_no_commit_when_a_part_lists_a_file_that_is_not_there(tmp_path: Path) -> None:
    state = make_state()
    one = CheckpointWriter(tmp_path, rank=1, world=2, attempt="a")
    one.save(1, slice_for_rank(state, 1, 2), {})
    one.wait()
    data_files(tmp_path, 1)[0].unlink()
    zero = CheckpointWriter(tmp_path, rank=0, world=2, attempt="a")
    zero.save(1, slice_for_rank(state, 0, 2), {})
    with pytest.raises(CheckpointError, match=r"data-a-00001-000.safetensors: missing"):
        zero.wait()
    assert find_latest(tmp_path) is None


def test_a_rank_that_cannot_write_stops_the_commit_at_once(tmp_path: Path) -> None:
    state = make_state()
    zero = CheckpointWriter(tmp_path, rank=0, world=2, attempt="a", timeout_s=60)
    one = CheckpointWriter(tmp_path, rank=1, world=2, attempt="a")
    in_the_way = tmp_path / "step_00000001/data-a-00001-000.safetensors"
    in_the_way.mkdir(parents=True)
    one.save(1, slice_for_rank(state, 1, 2), {})
    zero.save(1, slice_for_rank(state, 0, 2), {})
    with pytest.raises(CheckpointError, match=r"rank 1 could not write: .*data-a-00001-000"):
        zero.wait()
    with pytest.raises(OSError):
        one.wait()


def test_purge_keeps_the_last_and_the_marked(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step, {"x": torch.tensor(step)}, keep_last=2, keep_every=30)
    assert steps(tmp_path) == [30, 60, 70]
    save(tmp_path, 80, {"x": torch.tensor(80)}, keep_last=None)
    assert steps(tmp_path) == [30, 60, 70, 80]


def test_purge_reads_no_more_than_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run has hundreds of marked checkpoints."""
    for step in range(1, 8):
        save(tmp_path, step, {"x": torch.tensor(step)}, keep_last=2, keep_every=1)
    looked_at = []
    monkeypatch.setattr(commit, "_is_whole", lambda *which: looked_at.append(which) or True)
    commit.purge(tmp_path, 7, keep_last=2, keep_every=1)
    assert len(looked_at) == 2


def test_purge_counts_only_whole_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, {"x": torch.full((9,), step)}, keep_last=None)
    data_files(tmp_path, 3)[0].write_bytes(b"")
    save(tmp_path, 4, {"x": torch.full((9,), 4)}, keep_last=2)
    assert steps(tmp_path) == [2, 3, 4], "3 is damaged: 2 is the second whole one, and 3 is left to be looked at"
    data_files(tmp_path, 4)[0].write_bytes(b"")
    assert find_latest(tmp_path).step == 2


def test_a_purge_cut_short_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it removed anything
    for step in (1, 2):
        save(tmp_path, step, {"x": torch.tensor(step)}, keep_last=1)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        open_checkpoint(tmp_path / "step_00000001")
    assert find_latest(tmp_path).step == 2


def test_purge_leaves_what_another_run_saved(tmp_path: Path) -> None:
    for step, run in [(1, "one"), (2, None), (3, "two"), (4, "one"), (5, "two"), (6, "two")]:
        save(tmp_path, step, {"x": torch.tensor(step)}, attempt=f"{run}", run=run, keep_last=1)
    assert steps(tmp_path) == [2, 4, 6]
    assert open_checkpoint(tmp_path / "step_00000006").run == "two"
    assert open_checkpoint(tmp_path / "step_00000002").run is None


def test_purge_leaves_what_lies_ahead(tmp_path: Path) -> None:
    """A run taken up again at an earlier step must not lose what it has just saved to its own later past."""
    for step in (100, 200):
        save(tmp_path, step, {"x": torch.tensor(step)}, keep_last=1)
    save(tmp_path, 50, {"x": torch.tensor(50)}, attempt="b", keep_last=1)
    assert steps(tmp_path) == [50, 200]
