"""All ranks go on from the same whole checkpoint, whatever is damaged and whichever of them sees it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from pretrain import patience
from pretrain.checkpoint import CheckpointError, agree, newest_whole, open_checkpoint
from pretrain.checkpoint.errors import CheckpointUnreadableError
from pretrain.checkpoint.store import LocalStore
from pretrain.exit_codes import CRASHED
from tests.ranks import run_ranks
from tests.saves import make_state, save


def data(step: Path, i: int = -1) -> Path:
    return sorted(step.glob("data-*"))[i]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "flipped in the first file": (lambda s: flip(data(s, 0), -3), "checksum"),
    "flipped in the last file": (lambda s: flip(data(s), -3), "checksum"),
    "cut": (lambda s: data(s).write_bytes(data(s).read_bytes()[:-1]), "cut short"),
    "longer": (lambda s: data(s).write_bytes(data(s).read_bytes() + b"x"), "cut short or damaged"),
    "data gone": (lambda s: data(s).unlink(), "missing"),
    "manifest of garbage": (lambda s: (s / "manifest.json").write_bytes(b"\xff\x00" * 500), "damaged"),
    "manifest nested": (lambda s: (s / "manifest.json").write_bytes(b"[" * 100_000), "damaged"),
    "manifest no file": (
        lambda s: ((s / "manifest.json").unlink(), (s / "manifest.json").mkdir()),
        "manifest.json: cannot be read",
    ),
    "manifest gone": (lambda s: (s / "manifest.json").unlink(), "no manifest.json"),
}


def _step(*where: str) -> int | None:
    found = newest_whole(*where)
    return None if found is None else found.step


def _message(*where: str) -> str:
    try:
        return f"goes on from step {_step(*where)}"
    except CheckpointError as error:
        return str(error)


def _all_cases(rank: int, world: int, root: str) -> dict:
    """What this rank comes to, by case; every rank must come to the same."""
    found: dict = {kind.name: _step(str(kind)) for kind in sorted(Path(root, "one").iterdir())}
    for name in ("none", "torn", "all", "file"):
        found[name] = _message(f"{root}/{name}")
    share = open_checkpoint(f"{root}/good/step_00000001")._share(rank, world)
    found["elements"] = sum(r.length for held in share.values() for _, _, r in held)
    os.chdir(f"{root}/{'node' if rank == 0 else 'other-node'}")
    found["node"] = _message("run")
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_come_to_the_same(tmp_path: Path, world: int) -> None:
    state = make_state()
    save(tmp_path / "good", 1, state, 3)
    save(tmp_path / "good", 2, state, 3)
    for kind, (damage, _) in DAMAGE.items():
        shutil.copytree(tmp_path / "good", tmp_path / "one" / kind)
        damage(tmp_path / "one" / kind / "step_00000002")
    shutil.copytree(tmp_path / "good", tmp_path / "all")
    flip(data(tmp_path / "all/step_00000001"), -3)
    data(tmp_path / "all/step_00000002").unlink()
    shutil.copytree(tmp_path / "good/step_00000001", tmp_path / "torn/step_00000001")
    (tmp_path / "torn/step_00000001/manifest.json").unlink()
    (tmp_path / "file").write_text("no folder")
    shutil.copytree(tmp_path / "good", tmp_path / "node" / "run")
    (tmp_path / "other-node").mkdir()  # a disk of its own

    ranks = run_ranks(_all_cases, world, str(tmp_path))
    elements = sum(t.numel() for t in state.values())
    assert sum(found.pop("elements") for found in ranks) == elements, "together they look at everything, once"
    assert all(found == ranks[0] for found in ranks)
    said = ranks[0]
    assert [said[kind] for kind in DAMAGE] == [1] * len(DAMAGE)
    assert said["none"] == said["torn"] == said["file"] == "goes on from step None"
    assert "step_00000001" in said["all"]
    assert "missing" in said["all"]
    assert "move that folder away" in said["all"]
    assert "does not begin anew" in said["node"]
    assert "(seen by rank 1)" in said["node"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_passed_over_is_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, {"x": torch.randn(500)}, 3)
    save(tmp_path, 2, {"x": torch.randn(500)}, 3)
    damage, reason = DAMAGE[kind]
    damage(tmp_path / "step_00000002")
    assert newest_whole(tmp_path).step == 1
    (line,) = [r.message for r in caplog.records if "passed over" in r.message]
    assert "step_00000002" in line
    assert reason in line


def test_a_folder_that_may_not_be_read_is_not_taken_for_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, {"x": torch.randn(500)})
    for folder in (tmp_path, *list(tmp_path.parents)[:-1]):
        os.chmod(folder, folder.stat().st_mode | 0o711)
    (tmp_path / "step_00000002").chmod(0)
    tmp_path.chmod(0o755)
    me = os.geteuid()
    try:
        if me == 0:  # to whom nothing is forbidden
            os.seteuid(65534)
        with pytest.raises(CheckpointUnreadableError, match=r"step_00000002/manifest.json: .*Permission denied"):
            newest_whole(tmp_path)
    finally:
        os.seteuid(me)
        (tmp_path / "step_00000002").chmod(0o755)


def _a_disk_away(rank: int, world: int, root: str) -> list:
    """What this rank comes to when reads of the last rank fail a few times, and when they fail for good."""
    patience.PAUSES_S = (0.01, 0.01)
    found, real = [], os.preadv
    for times in (2, 3):
        fails = [OSError(errno.EIO, "the disk is away")] * times if rank == world - 1 else []

        def preadv(fd: int, buffers: list, offset: int, fails: list = fails) -> int:
            if fails:
                raise fails.pop()
            return real(fd, buffers, offset)

        os.preadv = preadv
        try:
            found.append(_step(root))
        except CheckpointUnreadableError as error:
            found += [error.exit_code, str(error)]
    os.preadv = real
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_a_read_that_fails_for_a_while_costs_no_checkpoint(tmp_path: Path, world: int) -> None:
    for step in (1, 2):
        save(tmp_path, step, make_state(), 3)
    ranks = run_ranks(_a_disk_away, world, str(tmp_path))
    assert all(found == ranks[0] for found in ranks)
    step, code, told = ranks[0]
    assert (step, code) == (2, CRASHED)
    assert f"{tmp_path}/step_00000002/data-a-" in told
    assert "the disk is away" in told
    assert told.endswith(f"the same command tries again (seen by ranks {world - 1})")


def test_ranks_share_the_look_at_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every rank at every file: a thousand ranks have a thousand each."""
    save(tmp_path, 1, make_state(), 6)
    looked_at: list[str] = []
    real = LocalStore.sizes
    monkeypatch.setattr(LocalStore, "sizes", lambda store, names: looked_at.extend(names) or real(store, names))
    for rank in range(3):
        assert agree._look(str(tmp_path / "step_00000001"), rank, 3)[1].fault is None
    assert sorted(looked_at) == sorted(p.name for p in (tmp_path / "step_00000001").glob("data-*"))


def test_two_starts_saves_of_one_step_are_no_agreement() -> None:
    seen = [agree._Seen("a", None), agree._Seen("b", None)]
    assert "different starts" in agree._fault(seen)
    assert agree._fault(seen[:1]) is None
