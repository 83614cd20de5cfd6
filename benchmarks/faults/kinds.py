"""The faults. Each strikes a run once, checks how the command ended, and leaves the run to be taken up again.

Whether it struck before the run was at its end is what it returns; `Wrong` says what should not have been.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.runs import Run, Start
from benchmarks.faults.settings import STEPS, Plan
from pretrain.exit_codes import DONE, HUNG, NOT_FINITE, REFUSED, STOPPED
from pretrain.telemetry import read_events


class Wrong(Exception):
    """A run did not do what is stated."""


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise Wrong(otherwise)


def kill(plan: Plan, run: Run) -> bool:
    """SIGKILL of a rank, or of the launcher."""
    start = run.start()
    hit = _reached(plan, start) and start.send(signal.SIGKILL, plan.rank)
    _ended(start, hit, 128 + signal.SIGKILL if plan.rank is not None else -signal.SIGKILL)
    return hit


def preempt(plan: Plan, run: Run) -> bool:
    """A signal that asks for a save and an end, as a scheduler sends it."""
    start, number = run.start(), plan.draw.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
    hit = _reached(plan, start) and start.send(number, plan.rank)
    code = start.wait()
    saved = run.saved()
    if saved is not None and saved.step == STEPS:
        return False  # it came with the last step
    expect(code == STOPPED, f"{number.name} ended it with {code}, not {STOPPED}")
    stops = [event for event in read_events(run.folder) if event["event"] == "stop"]
    expect(len(stops) == 1 and saved is not None, f"{number.name}: {len(stops)} stops in the log")
    return hit


def disk(plan: Plan, run: Run) -> bool:
    """No file can grow beyond half a checkpoint: at a start that has checkpoints behind it."""
    if not _killed_after_saves(run, 2):
        return False
    before, newest = run.saved_steps(), run.saved()
    assert newest is not None
    largest = max(file.stat().st_size for file in _folder(run, newest.step).glob("data-*"))
    start = run.start(file_limit=largest // 2)
    code = start.wait()
    expect(code == REFUSED, f"a full disk ended it with {code}, not {REFUSED}")
    expect("checkpoint not saved" in run.told, "the full disk was not told")
    expect(run.saved_steps() == before, f"checkpoints {before} became {run.saved_steps()}")
    return True


def damage(plan: Plan, run: Run) -> bool:
    """The newest checkpoint is torn, or a bit of it flips, while nobody looks."""
    if not _killed_after_saves(run, 2):
        return False
    newest = run.saved()
    assert newest is not None
    file = plan.draw.choice(sorted(_folder(run, newest.step).iterdir()))
    plan.draw.choice((_flip, _cut, Path.unlink))(file)  # type: ignore[operator]
    _ended(run.start(), True, DONE)
    begun = [e.get("step") or 0 for e in read_events(run.folder) if e["event"] in ("start", "resume")][-1]
    expect(begun < newest.step, f"resumed at step {begun} from a checkpoint with a damaged {file.name}")
    return True


def nan_raise(plan: Plan, run: Run) -> bool:
    """A NaN with faults.nan=raise: it stops before the step, and is well once the cause is gone."""
    _ended(run.start(), True, NOT_FINITE)
    expect("No weight was touched" in run.told, "nothing is said of the weights")
    expect(all(step <= plan.step for step in run.saved_steps()), f"saved {run.saved_steps()} behind step {plan.step}")
    poison(run).unlink()
    return True


def nan_skip(plan: Plan, run: Run) -> bool:
    """A NaN with faults.nan=skip, and a kill somewhere before or behind it."""
    return kill(plan, run)


def nan_rewind(plan: Plan, run: Run) -> bool:
    """A NaN with faults.nan=rewind: back to the newest checkpoint, and on without the data."""
    _ended(run.start(), True, DONE)
    expect((run.folder / "skips.json").is_file(), "nothing was left out")
    return True


def reader(plan: Plan, run: Run) -> bool:
    """A shard is cut short under the readers, and then restored."""
    shard = sorted(Path(run.recipe.data.sources[0].shards).glob("*.tar"))[0]  # type: ignore[arg-type]
    whole = shard.with_suffix(".whole")
    shutil.copy2(shard, whole)
    start = run.start()
    hit = _reached(plan, start)
    os.truncate(shard, 1024)
    code = start.wait()
    shutil.copy2(whole, shard)
    if code == DONE:
        return False  # it had read all it needed
    expect(code == REFUSED, f"a shard cut short ended it with {code}, not {REFUSED}")
    expect(shard.name in run.told, "the shard is not named")
    return hit


def hang(plan: Plan, run: Run) -> bool:
    """A rank stops where it stands (SIGSTOP); the others find out, say whom they wait for, and end."""
    start, stopped = run.start(), plan.rank or 0
    hit = _reached(plan, start) and start.send(signal.SIGSTOP, stopped)
    code = start.wait()
    saved = run.saved()
    if not hit or (saved is not None and saved.step == STEPS):
        return False
    expect(code == HUNG, f"a rank that hangs ended it with {code}, not {HUNG}")
    expect(f"rank {stopped} on" in run.told, f"rank {stopped}, which hung, is not named")
    stacks = list((run.folder / "heartbeat").glob("*.stacks"))
    expect(any("File " in file.read_text() for file in stacks), "no stacks were written")
    return True


FAULTS: dict[str, Callable[[Plan, Run], bool]] = {
    "kill": kill,
    "preempt": preempt,
    "disk": disk,
    "damage": damage,
    "nan-raise": nan_raise,
    "nan-skip": nan_skip,
    "nan-rewind": nan_rewind,
    "reader": reader,
    "hang": hang,
}


def poison(run: Run) -> Path:
    """The file that makes the poisoned sample do harm."""
    return run.folder.with_suffix(".poison")


def _reached(plan: Plan, start: Start) -> bool:
    """Wait for the moment of the plan; False when the run ended before."""
    if not start.until_step(plan.step):
        return False
    if plan.saving:
        return start.until_saving()
    time.sleep(plan.delay_s)
    return not start.ended


def _ended(start: Start, hit: bool, expected: int) -> None:
    code = start.wait()
    expect(code == expected or (not hit and code == DONE), f"ended with {code}, not {expected}")


def _killed_after_saves(run: Run, count: int) -> bool:
    """Train until so many checkpoints are whole, and end outright; False when the run was at its end before."""
    start = run.start()
    if start.until_saved(count):
        start.send(signal.SIGKILL)
    return start.wait() != DONE


def _folder(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step_{step:08d}"


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)
