"""A later start of a run takes it over, and what lives of an earlier one writes no more: real ranks, suspended."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointError, CheckpointWriter, commit, find_latest, forestall, slice_for_rank
from pretrain.distributed.process import Process
from pretrain.errors import UserError
from pretrain.exit_codes import DONE, LOST, REFUSED
from pretrain.fence import ATTEMPT, LOCK, Fence, SupersededError, hold, named
from pretrain.recipe import parse_recipe
from pretrain.run import RunFolder
from pretrain.telemetry import ProfileWindow, RunLog, RunPage, read_events
from pretrain.telemetry.heartbeat import Heartbeat
from pretrain.telemetry.profile_request import write_request
from tests.ranks import SERVER
from tests.runs import Start, _command, losses, weights
from tests.saves import make_state, save
from tests.tiny import recipe_data, write_recipe, write_shards

CPU = torch.device("cpu")
SLURM = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME")


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for variable in SLURM:
        monkeypatch.delenv(variable, raising=False)


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder of a run, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def take(run: Path, attempt: str = "later") -> None:
    """Another start takes the run over."""
    who = {"id": attempt, "host": "n7", "pid": 3, "job": "7", "restart": "1", "time": 0}
    (run / ATTEMPT).write_text(json.dumps(who))


# ---- runs of two ranks, suspended as a whole where it is worst


class Attempt(Start):
    """The command as a task of Slurm job 7, with `suspended` done in it first."""

    def __init__(self, argv: Sequence[str], log: Path, restart: int, suspended: Callable[[], None] | None = None):
        self._log = log
        self._process = SERVER.Process(target=_under_slurm, args=(argv, log, restart, suspended))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait_until_suspended(self) -> None:
        stat, deadline = Path(f"/proc/{self.pid}/stat"), time.monotonic() + 120
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)


def _under_slurm(argv: Sequence[str], log: Path, restart: int, suspended: Callable[[], None] | None) -> None:
    os.environ.update(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restart))
    if suspended:
        suspended()
    _command(argv, log, None)


def suspend() -> None:
    """All ranks, and what launched them."""
    os.killpg(0, signal.SIGSTOP)


def in_a_step() -> None:
    step = RunLog.step

    def patched(self: RunLog, number: int, numbers: Any) -> None:
        step(self, number, numbers)
        if number == 3 and self.active:
            while not (self.path.parent / "checkpoints/step_00000002/manifest.json").exists():
                time.sleep(0.01)
            suspend()

    RunLog.step = patched


def before_the_manifest() -> None:
    put = commit._put

    def patched(folder: Any, manifest: Any, may_write: Callable[[], None]) -> None:
        if manifest.step == 4:
            suspend()
        put(folder, manifest, may_write)

    commit._put = patched


def between_the_question_and_the_rename() -> None:
    put = commit._put

    def patched(folder: Any, manifest: Any, may_write: Callable[[], None]) -> None:
        def asked() -> None:
            may_write()
            if manifest.step == 4:
                suspend()

        put(folder, manifest, asked)

    commit._put = patched


def in_the_data_of_the_second_rank() -> None:
    put = CheckpointWriter._put

    def patched(self: CheckpointWriter, folder: Any, name: str, chunks: list) -> None:
        if self.rank == 1 and name.startswith("data-") and str(folder).endswith("step_00000004"):
            self._may_write()
            suspend()
            folder.write(name, chunks, ready=self._may_write)
        put(self, folder, name, chunks)

    CheckpointWriter._put = patched


def before_a_purge() -> None:
    purge = commit._is_of

    def patched(run: str, folder: Any) -> bool:
        found = purge(run, folder)
        suspend()
        return found

    commit._is_of = patched


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def two_ranks(shards: Path, folder: Path, **changes: Any) -> tuple[str, Path]:
    run = folder / "run"
    data = recipe_data(shards, run, world=2, faults={"heartbeat_s": 0.2}, **changes)
    return str(write_recipe(folder / "r.yaml", data)), run


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, run = two_ranks(shards, folder)
    assert Attempt([recipe], folder / "log", 0).wait(240) == DONE
    return run


@pytest.mark.parametrize(
    ("suspended", "from_step"),
    [
        (in_a_step, 2),
        (in_the_data_of_the_second_rank, 2),
        (before_the_manifest, 2),
        (between_the_question_and_the_rename, 2),
        (before_a_purge, 6),
    ],
)
def test_what_wakes_up_behind_a_later_attempt_changes_nothing(tmp_path, shards, undisturbed, suspended, from_step):
    recipe, run = two_ranks(shards, tmp_path)
    old = Attempt([recipe, "faults.heartbeat_s=600"], tmp_path / "old.log", 0, suspended)  # too late to be of help
    old.wait_until_suspended()
    new = Attempt([recipe], tmp_path / "new.log", 1)
    assert new.wait(240) == DONE
    told = (tmp_path / "new.log").read_text()
    assert "taken over from an earlier attempt of this job (process" in told
    assert f" on {os.uname().nodename}, Slurm job 7, restart 0, since" in told
    assert "did not leave within 1 s" in told

    ended = tree(run)
    os.killpg(old.pid, signal.SIGCONT)
    assert old.wait(120) == LOST, (tmp_path / "old.log").read_text()
    assert "was taken over by a later start (process" in (tmp_path / "old.log").read_text()
    assert tree(run) == ended

    assert [e["step"] for e in read_events(run) if e["event"] == "resume"] == [from_step]
    assert losses(run) == losses(undisturbed)
    found, expected = weights(run), weights(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(ended).count("checkpoints/step_00000008/manifest.json") == 1
    assert not [name for name in ended if name.endswith(".tmp")]


def test_an_attempt_that_still_lives_leaves_for_the_next_one(tmp_path, shards):
    """The lock goes from hand to hand: neither is suspended, and the first would train on for minutes."""
    recipe, run = two_ranks(shards, tmp_path, steps=4000, checkpoint={"every": 4})
    old = Attempt([recipe], tmp_path / "old.log", 0)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/step_00000004/manifest.json").is_file():
        assert time.monotonic() < deadline, (tmp_path / "old.log").read_text()
        time.sleep(0.05)
    again = Attempt([recipe], tmp_path / "again.log", 0)
    assert again.wait(120) == REFUSED
    told = (tmp_path / "again.log").read_text()
    assert told.count("another process is training into") == 1
    assert "Slurm job 7, restart 0" in told
    assert "`scancel 7`" in told
    step = find_latest(run / "checkpoints").step
    new = Attempt([recipe, f"steps={step + 8}", "faults.heartbeat_s=5"], tmp_path / "new.log", 1)
    assert old.wait(120) == LOST, (tmp_path / "old.log").read_text()
    assert new.wait(240) == DONE, (tmp_path / "new.log").read_text()
    assert "which has left" in (tmp_path / "new.log").read_text()


# ---- the lock


def in_job(monkeypatch, job: str | None, restart: int = 0, task: str | None = None) -> None:
    for variable, value in zip(SLURM, (job, str(restart), task and "7", task), strict=False):
        if job and value:
            monkeypatch.setenv(variable, value)
        else:
            monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((None,), (None,)),
        ((None,), ("7", 1)),
        (("7", 0), (None,)),
        (("7", 0), ("8", 1)),
        (("7", 1), ("7", 1)),
        (("7", 2), ("7", 1)),
        (("7", 0, "3"), ("7", 1, "4")),
        (("7", 0), ("7", 1, "4")),
    ],
)
def test_whoever_is_no_earlier_attempt_of_the_same_job_keeps_the_run(tmp_path, monkeypatch, first, second):
    in_job(monkeypatch, *first)
    with hold(tmp_path, "one", 0):
        before = tree(tmp_path)
        in_job(monkeypatch, *second)
        with pytest.raises(UserError, match="another process is training into") as caught, hold(tmp_path, "two", 0):
            pass
        assert caught.value.exit_code == REFUSED
        assert f"process {os.getpid()} on {os.uname().nodename}" in str(caught.value)
        expected = f"`scancel {first[0]}`" if first[0] else f"`kill {os.getpid()}` on {os.uname().nodename}"
        assert expected in str(caught.value)
        assert Fence(tmp_path, "one").superseded() is None
        assert tree(tmp_path) == before
    if second != ("7", 1):  # which would be earlier than the one that has ended
        with hold(tmp_path, "two", 0):
            assert Fence(tmp_path, "one").superseded()["id"] == "two"


@pytest.mark.parametrize("task", [None, "3"])
def test_a_requeued_job_takes_the_lock_of_its_earlier_attempt(tmp_path, monkeypatch, caplog, task):
    in_job(monkeypatch, "7", 0, task)
    with hold(tmp_path, "one", 0):
        in_job(monkeypatch, "7", 3, task)
        with hold(tmp_path, "two", 0.3), pytest.raises(SupersededError, match="Slurm job 7, restart 3") as caught:
            Fence(tmp_path, "one").check()
        assert caught.value.exit_code == LOST
        assert "Slurm job 7, restart 0" in caplog.text
        in_job(monkeypatch, "7", 2, task)  # the first still has its own file locked, and the new one is free
        with pytest.raises(UserError, match="a later attempt of this job has trained into it"), hold(tmp_path, "x", 0):
            pass
        assert json.loads((tmp_path / ATTEMPT).read_text())["id"] == "two"
        in_job(monkeypatch, "9", 0)
        with hold(tmp_path, "three", 0), pytest.raises(UserError, match="Slurm job 9"), hold(tmp_path, "four", 0):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, ATTEMPT]


def test_a_lock_that_only_the_file_system_holds_can_be_removed(tmp_path):
    with hold(tmp_path, "one", 0):
        (tmp_path / LOCK).unlink()
        with hold(tmp_path, "two", 0), pytest.raises(SupersededError):
            Fence(tmp_path, "one").check()


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"id": null}', "\0\xff"])
def test_what_is_missing_or_cannot_be_read_proves_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / ATTEMPT).write_text(text)
    assert Fence(tmp_path, "one").superseded() is None
    Fence(tmp_path, "one").check()
    Fence(tmp_path / "absent", "one").check()


@pytest.mark.parametrize("who", [{}, {"time": "noon"}, {"time": 1e300, "job": ["x"], "restart": None}])
def test_whoever_it_is_has_a_name(who):
    assert named(who).startswith("process unknown on an unknown host")


# ---- who asks


def parts(root: Path, world: int, **options: Any) -> list[CheckpointWriter]:
    return [CheckpointWriter(root, rank=rank, world=world, attempt="old", **options) for rank in range(world)]


def test_a_save_of_a_superseded_start_leaves_nothing(tmp_path):
    fence, root = Fence(tmp_path, "old"), tmp_path / "checkpoints"
    zero, one = parts(root, 2, may_write=fence.check, keep_last=1, timeout_s=30)
    for step in (1, 2):
        for writer in (one, zero):
            writer.save(step, slice_for_rank(make_state(step), writer.rank, 2), {})
            writer.wait()
    zero.save(3, slice_for_rank(make_state(3), 0, 2), {})
    while not (root / "step_00000003/part-old-00000.json").is_file():
        time.sleep(0.01)  # until it only waits for the other rank's part
    take(tmp_path)
    with pytest.raises(SupersededError):
        one.save(3, slice_for_rank(make_state(3), 1, 2), {})
    one._may_write = lambda: None  # it had asked just before
    one.save(3, slice_for_rank(make_state(3), 1, 2), {})
    one.wait()
    with pytest.raises(SupersededError):
        zero.wait()
    assert find_latest(root, verify=True).step == 2
    assert not list(root.glob("step_00000003/*old-00000*"))
    before = tree(root)
    for rank in range(2):
        with pytest.raises(SupersededError):
            CheckpointWriter(root, rank=rank, world=2, attempt="old", may_write=fence.check)
    assert tree(root) == before


def test_nothing_is_purged_by_a_superseded_start(tmp_path):
    fence, root = Fence(tmp_path, "old"), tmp_path / "checkpoints"
    (writer,) = parts(root, 1, may_write=fence.check, keep_last=1)
    writer.save(1, slice_for_rank(make_state(1), 0, 1), {})
    writer.wait()
    asked, put = [], commit._put

    def taken_after(*manifest: Any) -> None:
        put(*manifest)
        asked.append(take(tmp_path))

    commit._put = taken_after
    try:
        writer.save(2, slice_for_rank(make_state(2), 0, 1), {})
        with pytest.raises(SupersededError):
            writer.wait()
    finally:
        commit._put = put
    assert asked
    assert [find_latest(root, at_most=step, verify=True).step for step in (1, 2)] == [1, 2]
    with pytest.raises(SupersededError):
        commit.purge(writer.root, 2, 1, None, None, fence.check)
    assert find_latest(root, at_most=1, verify=True).step == 1


def test_a_commit_comes_before_a_later_start_looks_or_never(tmp_path, monkeypatch):
    save(tmp_path, 1, make_state(1), attempt="first")
    put = commit._put

    def forestalled(folder: Any, manifest: Any, may_write: Callable[[], None]) -> None:
        put(folder, manifest, lambda: forestall([tmp_path], manifest.attempt if manifest.step == 2 else "new"))

    monkeypatch.setattr(commit, "_put", forestalled)
    save(tmp_path, 2, make_state(2), attempt="old")  # a start does not forestall itself
    with pytest.raises(CheckpointError, match="not saved"):
        save(tmp_path, 3, make_state(3), attempt="old")
    assert find_latest(tmp_path, verify=True).step == 2
    assert not list((tmp_path / "step_00000003").glob("*"))


def test_a_superseded_start_changes_nothing_in_its_folder(tmp_path, shards):
    folder = RunFolder(tmp_path / "run")
    recipe = parse_recipe(recipe_data(shards, folder.path), "test")
    folder.begin(recipe, {"from_step": 0})
    folder.fence = Fence(folder.path, "old")
    log = RunLog(folder.path, total_steps=8, tensorboard=False, may_write=folder.may_write)
    log.step(1, {"loss": 1.0})
    page = RunPage(folder.path, may_write=folder.may_write)
    page.write(now=True)
    profile = ProfileWindow(folder.path, Process(0, 1, 0, CPU), folder.may_write)
    write_request(folder.path, 2)
    profile.start(1)
    take(folder.path)
    before = tree(folder.path)
    damage = {"step": 1, "reason": "cut"}
    for write in (
        lambda: log.step(2, {"loss": 0.5}),
        lambda: log.event("save", step=2),
        lambda: RunLog(folder.path, total_steps=8, tensorboard=False, may_write=folder.may_write),
        lambda: page.write(now=True),
        profile.stop,
        lambda: folder.claim(recipe),
        lambda: folder.begin(recipe, {"from_step": 0}),
        lambda: folder.ended("done"),
        lambda: folder.add_skip(0, 1),
        lambda: folder.note_damage(damage),
        log.close,
    ):
        with pytest.raises(SupersededError):
            write()
        assert tree(folder.path) == before
    RunFolder(folder.path).note_damage(damage)  # who has no fence is no rank of an earlier start
    assert tree(folder.path) != before


def _beat_on(run: Path, log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    logging.getLogger().handlers.clear()
    process = Process(1, 2, 0, CPU)
    Heartbeat(run, process=process, every_s=0.1, hang_s=None, may_write=Fence(run, "old").check)
    time.sleep(60)  # in a collective, in C: it would never ask by itself


def test_a_rank_that_stands_still_ends_by_its_heartbeat(tmp_path):
    (tmp_path / "run").mkdir()
    rank = SERVER.Process(target=_beat_on, args=(tmp_path / "run", tmp_path / "log"))
    rank.start()
    sign = tmp_path / "run/heartbeat/rank_00001.json"
    while not sign.is_file():
        time.sleep(0.02)
    take(tmp_path / "run")
    rank.join(30)
    assert rank.exitcode == LOST
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "rank 1: " in line
    assert "(process 3 on n7, Slurm job 7, restart 1, since 1970-01-01 00:00:00 UTC)" in line
    assert sorted(path.name for path in sign.parent.iterdir()) == [sign.name]
