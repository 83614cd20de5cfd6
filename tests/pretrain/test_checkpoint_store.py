"""Checkpoints in an object store: a real S3 server, reached by s3fs from this process and from ranks of their own."""

from __future__ import annotations

import json
import logging
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest
import torch

from pretrain import patience
from pretrain.checkpoint import (
    CheckpointDiskError,
    CheckpointError,
    CheckpointWriter,
    claim,
    find_checkpoint,
    find_latest,
    newest_whole,
    objects,
    open_checkpoint,
    open_store,
    owners,
    slice_for_rank,
)
from pretrain.checkpoint.errors import CheckpointUnreadableError
from pretrain.checkpoint.layout import step_dirs
from pretrain.checkpoint.store import LocalStore
from tests.ranks import run_ranks
from tests.saves import META, bits, check, make_state, save

pytest.importorskip("s3fs", reason="the S3 client is not installed")
server = pytest.importorskip("moto.server", reason="the S3 server is not installed")


def reach(endpoint: str) -> None:
    """Let fsspec's s3:// be that server, asked once: what is refused here stays refused."""
    once = {"retries": {"max_attempts": 0}}
    fsspec.config.conf["s3"] = {"endpoint_url": endpoint, "key": "k", "secret": "s", "config_kwargs": once}


class Bucket:
    """A server that can be stopped and started again with all that it holds."""

    def __init__(self) -> None:
        self.server, self.port = None, 0
        self.start()
        fsspec.filesystem("s3").mkdir("bucket")

    def start(self) -> None:
        self.server = server.ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        reach(self.endpoint)

    def stop(self) -> None:
        self.server.stop()

    def open_to_all(self, requests: int) -> None:
        """After so many requests keys and policies are looked at."""
        plain = {"Content-Type": "text/plain"}
        url = f"{self.endpoint}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, str(requests).encode(), plain)).close()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    bucket = Bucket()
    yield bucket
    bucket.stop()
    del fsspec.config.conf["s3"]


@pytest.fixture
def root(bucket: Bucket, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


def keys(root: str) -> set[str]:
    return {k.removeprefix(root.removeprefix("s3://")) for k in fsspec.filesystem("s3").find(root)}


def steps(root: str) -> list[int]:
    return sorted(step_dirs(root))


def put(path: str, change) -> None:
    """Change the bytes of an object."""
    fs = fsspec.filesystem("s3")
    fs.pipe_file(path, bytes(change(bytearray(fs.cat_file(path)))))


def flipped(data: bytearray) -> bytearray:
    data[-100] ^= 4
    return data


# --- written and read


def _save_and_resume(rank: int, world: int, endpoint: str, root: str) -> tuple:
    """Two steps by real ranks, the newest damaged in one place; which one do the ranks go on from?"""
    reach(endpoint)
    writer = CheckpointWriter(root, rank=rank, world=world, attempt="z", timeout_s=60, file_limit=1 << 11)
    for step in (1, 2):
        writer.save(step, slice_for_rank(make_state(step), rank, world), META)
        writer.wait()
    torch.distributed.barrier()
    newest = newest_whole(root)
    if rank == 0:
        put(data(f"{root}/step_00000002"), flipped)
    torch.distributed.barrier()
    before = newest_whole(root)
    check(before, make_state(1))
    torch.distributed.barrier()
    if rank == 0:
        put(data(f"{root}/step_00000002"), flipped)  # and whole again
    return newest.step, before.step


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_save_to_a_bucket_and_go_on_from_it(bucket: Bucket, root: str, world: int) -> None:
    assert run_ranks(_save_and_resume, world, bucket.endpoint, root) == [(2, 1)] * world
    assert not [k for k in keys(root) if "part-" in k or "trial-" in k]
    checkpoint = open_checkpoint(f"{root}/step_00000002")
    assert (checkpoint.step, checkpoint.world, checkpoint.meta) == (2, world, META)
    for reader in range(5):
        for f in slice_for_rank(make_state(2), reader, 5):
            assert bits(checkpoint.read_range(f.name, f.offset, f.offset + f.data.numel())) == bits(f.data)


def test_a_large_file_goes_up_in_parts_and_a_small_range_comes_alone(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    calls, real = [], s3fs.S3FileSystem._call_s3

    async def noted(self, method, *args, **kwargs):
        calls.append((method, kwargs.get("Range")))
        return await real(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    monkeypatch.setattr(objects, "_PART", 5 << 20)  # the least that S3 allows
    monkeypatch.setattr(objects, "_SLICE", 1 << 20)
    x = torch.randn(4_000_000)
    save(root, 1, {"x": x})
    etag = fsspec.filesystem("s3").info(data(f"{root}/step_00000001"))["ETag"].strip('"')
    assert int(etag.rpartition("-")[2]) == 4, "16 MB in parts of 5"

    checkpoint = find_latest(root)
    calls.clear()
    assert torch.equal(checkpoint.read_range("x", 500_000, 500_010), x[500_000:500_010])
    asked = [tuple(map(int, r.removeprefix("bytes=").split("-"))) for name, r in calls if name == "get_object"]
    assert len(asked) == 3, "the header's length, the header, the range"
    assert sum(hi - lo + 1 for lo, hi in asked) < 500
    assert torch.equal(checkpoint.read("x"), x)


def test_a_run_is_found_wherever_it_keeps_its_checkpoints(root: str, tmp_path: Path) -> None:
    state = make_state()
    save(f"{root}/checkpoints", 3, state)
    check(find_checkpoint(root), state)
    check(find_checkpoint(Path(root)), state)  # as a command line's argument comes, with one slash left
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps([{"to": f"{root}/checkpoints"}]))
    assert str(find_checkpoint(run).path) == f"{root}/checkpoints/step_00000003"


def test_a_run_goes_on_from_the_newest_of_all_its_places(root: str, tmp_path: Path) -> None:
    save(tmp_path, 5, make_state())
    assert newest_whole(root, tmp_path).step == 5
    save(root, 6, make_state())
    assert newest_whole(tmp_path, root).step == 6


# --- what can go wrong


def test_a_connection_that_dies_in_a_save_costs_that_save_only(
    bucket: Bucket, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the data and before the manifest: rank 0 still waits for the other's part."""
    monkeypatch.setattr(patience, "PAUSES_S", (0.01,))
    state = make_state()
    save(root, 1, state)
    zero = CheckpointWriter(root, rank=0, world=2, attempt="b", timeout_s=60)
    one = CheckpointWriter(root, rank=1, world=2, attempt="b")
    zero.save(2, slice_for_rank(state, 0, 2), META)
    while not any("part-b-00000" in k for k in keys(root)):
        pass
    bucket.stop()
    try:
        one.save(2, slice_for_rank(state, 1, 2), META)
        with pytest.raises(
            CheckpointDiskError, match=r"not saved: EndpointConnectionError.*Earlier checkpoints are unt"
        ):
            one.wait()
        with pytest.raises(CheckpointError, match=r"step_00000002: not saved: EndpointConnectionError"):
            zero.wait()
        with pytest.raises(CheckpointUnreadableError, match=r"the list of its checkpoints cannot be read.*tries again"):
            newest_whole(root)
    finally:
        bucket.start()
    assert newest_whole(root).step == 1
    for rank, writer in enumerate((zero, one)):
        writer.save(3, slice_for_rank(state, rank, 2), META)
    one.wait()
    zero.wait()
    check(newest_whole(root), state)
    assert steps(root) == [1, 3], "what the broken save left is cleared away"


@pytest.mark.parametrize(("arrives", "readable"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_manifest_whose_answer_is_lost(
    root: str, monkeypatch: pytest.MonkeyPatch, arrives: bool, readable: bool
) -> None:
    """It is there: the save has succeeded. It is not: the room is given back. Nobody knows: no byte is touched."""
    import s3fs

    monkeypatch.setattr(patience, "PAUSES_S", (0.01,))
    state = make_state()
    save(root, 1, state)
    real = s3fs.S3FileSystem._call_s3

    async def failing(self, method, *args, **options):
        manifest = str(options.get("Key")).endswith("2/manifest.json")
        if manifest and method == "put_object":
            if arrives:
                await real(self, method, *args, **options)
            raise ConnectionError("no answer")
        if manifest and not readable:
            raise ConnectionError("no answer either")
        return await real(self, method, *args, **options)

    writer = CheckpointWriter(root, attempt="b")
    with monkeypatch.context() as patched:
        patched.setattr(s3fs.S3FileSystem, "_call_s3", failing)
        writer.save(2, slice_for_rank(state, 0, 1), META)
        told = "" if arrives and readable else "no answer" if readable else "has arrived is not known"
        with pytest.raises(CheckpointError, match=told) if told else nullcontext():
            writer.wait()
    assert writer.committed == (2 if not told else None)
    assert any("2/data-b" in key for key in keys(root)) == (arrives or not readable)
    newest = newest_whole(root)
    assert newest.step == (2 if arrives else 1)
    check(newest, state)
    writer.save(3, slice_for_rank(state, 0, 1), META)
    writer.wait()
    assert steps(root) == ([1, 2, 3] if arrives else [1, 3])


def test_a_place_is_one_runs(root: str) -> None:
    claim(root, "one", {"output": "/runs/one"})
    claim(root, "one", {"output": "/runs/one"})
    with pytest.raises(CheckpointError, match=r"another run .*\(id one, output /runs/one\).*checkpoint.to=.*run_id"):
        claim(root, "two", {})
    assert owners(root) == {"one"}
    save(root, 1, make_state(), run="one")
    fsspec.filesystem("s3").rm_file(f"{root}/run-one.json")
    with pytest.raises(CheckpointError, match="id one"):
        claim(root, "two", {})
    assert owners(root) == set()


def test_of_two_that_come_at_once_none_shares(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that nobody is there."""
    write = objects.ObjectStore.write

    def both(store, name, chunks, **options) -> None:
        write(store, "run-two.json", [b"{}"])
        write(store, name, chunks, **options)

    monkeypatch.setattr(objects.ObjectStore, "write", both)
    with pytest.raises(CheckpointError, match="id two"):
        claim(root, "one", {})
    assert owners(root) == {"two"}


DAMAGE = {
    "data gone": lambda step: fsspec.filesystem("s3").rm(data(step)),
    "data cut": lambda step: put(data(step), lambda d: d[:-1]),
    "byte flipped": lambda step: put(data(step), flipped),
    "manifest of garbage": lambda step: put(f"{step}/manifest.json", lambda _: b"[" * 100_000),
    "manifest gone": lambda step: fsspec.filesystem("s3").rm(f"{step}/manifest.json"),
}


def data(step: str) -> str:
    return next(k for k in fsspec.filesystem("s3").find(step) if "data-" in k)


def test_damage_is_passed_over_and_is_never_begun_beside(root: str, caplog: pytest.LogCaptureFixture) -> None:
    state = {"x": torch.randn(1000)}
    for step in range(len(DAMAGE) + 1):
        save(root, step, state, keep_last=None)
    for step, damage in enumerate(DAMAGE.values(), 1):
        damage(f"{root}/step_{step:08d}")
    assert newest_whole(root).step == 0
    told = [record.message for record in caplog.records if "passed over" in record.message]
    for line, reason in zip(reversed(told), ("missing", "cut short", "checksum", "damaged", "no manifest.json")):
        assert reason in line
    fsspec.filesystem("s3").rm(f"{root}/step_00000000", recursive=True)
    with pytest.raises(CheckpointError, match="does not begin anew") as caught:
        newest_whole(root)
    assert "step_00000003/data-a-00000-000.safetensors" in str(caught.value)
    assert "step_00000005" not in str(caught.value), "never was whole, for all that is known"


def test_old_ones_are_purged_and_torn_ones_swept(root: str) -> None:
    for step in range(1, 7):
        save(root, step, {"x": torch.tensor(step)}, keep_last=2, keep_every=3)
    assert steps(root) == [3, 5, 6]
    CheckpointWriter(root, rank=1, world=2, attempt="torn").save(7, slice_for_rank(make_state(), 1, 2), {})
    while not any("part-torn" in k for k in keys(root)):
        pass
    assert find_latest(root).step == 6
    CheckpointWriter(root, attempt="next")
    assert steps(root) == [3, 5, 6]


def test_a_place_that_cannot_be_written_is_refused_at_once(bucket: Bucket, root: str) -> None:
    with pytest.raises(CheckpointDiskError, match=r"does not exist.*make the bucket, or correct the URL"):
        CheckpointWriter("s3://no-such-bucket/run", attempt="a")
    bucket.open_to_all(requests=0)
    try:
        with pytest.raises(CheckpointDiskError, match="check the credentials"):
            CheckpointWriter(root, attempt="a")
        with pytest.raises(CheckpointUnreadableError, match="the list of what it holds cannot be read"):
            find_checkpoint(root)
    finally:
        bucket.open_to_all(requests=1 << 30)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/run", "s4://bucket/run: .*a URL is such as s3://"),
        ("s3://", "names no bucket"),
        ("s3//bucket/run", "neither a folder nor a URL"),
        ("s3:bucket/run", "neither a folder nor a URL"),
    ],
)
def test_a_url_that_is_none_is_said(url: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_store(url)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(CheckpointError, match=r"pip install 's3fs'"):
        open_store("s3://bucket/run")


def test_a_folder_stays_a_folder(tmp_path: Path) -> None:
    for where in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"file:{tmp_path}"):
        store = open_store(where)
        assert isinstance(store, LocalStore)
        assert store.path == tmp_path
    save("memory://run", 1, make_state())
    check(find_checkpoint("memory://run"), make_state())
