"""The index of a tar: equal to tarfile's on whole tars, and what is kept of damaged ones."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.shards.grouping import split_name
from pretrain.shards.index import build_index, index_length, load_index, sidecar_places
from pretrain.shards.tarwalk import checksum_is_right

Members = list[tuple[str, bytes]]
BLOCK = 512


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(n: int, extensions: tuple[str, ...] = ("jpg", "txt")) -> Members:
    return [(f"{i:05d}.{e}", f"{e} of {i} ".encode() * (i % 90)) for i in range(n) for e in extensions]


def by_tarfile(path: Path) -> dict[str, dict[str, bytes]]:
    """What webdataset's rule makes of the members that tarfile sees."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            named = split_name(info.name) if info.isreg() else None
            if named:
                stream = tar.extractfile(info)
                assert stream
                found.setdefault(named[0], {})[named[1]] = stream.read()
    return found


def by_index(path: Path) -> dict[str, dict[str, bytes]]:
    index, data = build_index(path), path.read_bytes()
    return {
        key: {e: data[offset : offset + size] for e, (offset, size) in index.members(row).items()}
        for row, key in enumerate(index.keys)
    }


def header_at(path: Path, name: str) -> int:
    """Where a member's header begins."""
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def random_members(seed: int) -> Members:
    """Names of all kinds: long, deep, unicode, dotted, without extension; each key's members together."""
    draw = random.Random(seed)
    folders = ["", "a/", "dir.with.dots/", "é日本/", "x" * 90 + "/", "deep/" * 30]
    members = []
    for i in range(draw.randint(0, 40)):
        stem = draw.choice(folders) + draw.choice(["k", "ключ", "with space", "l" * 120]) + str(i)
        for extension in draw.sample(["jpg", "TXT", "seg.png", "json", "cls"], draw.randint(1, 4)):
            members.append((f"{stem}.{extension}", draw.randbytes(draw.choice([0, 1, 511, 512, 513, 5000]))))
        if draw.random() < 0.1:
            members.append((f"README{i}", b"no extension, no sample"))
    return members


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(12))
def test_equals_tarfile_on_random_tars(tmp_path: Path, seed: int, format: int) -> None:
    path = write_tar(tmp_path / "a.tar", random_members(seed), format)
    assert by_index(path) == by_tarfile(path)
    assert build_index(path).damage == []


def test_ustar_prefix_and_base256_and_pax_sizes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("f" * 80 + "/" + "n" * 90 + ".jpg", b"long"), ("b.jpg", b"short")])
    assert by_index(path) == by_tarfile(path)
    size = 9 << 30  # 9 GiB, not there: the header alone tells; the file is sparse on disk
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.jpg")
        info.size = size
        big = tmp_path / f"big{format}.tar"
        with open(big, "wb") as file:
            header = info.tobuf(format)
            file.write(header)
            file.truncate(len(header) + size + 1024)
        assert build_index(big).members(0) == {"jpg": (len(header), size)}


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar is not on PATH")
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_equals_tarfile_on_gnu_tars(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "in"
    deep = folder / ("sub" * 10) / ("folder" * 8)
    if format in ("gnu", "pax"):
        deep = deep / ("very" * 40)
    deep.mkdir(parents=True)
    for stem in ("a", "b.c", "naïve"):
        (deep / f"{stem}.jpg").write_bytes(b"j" * 700)
        (deep / f"{stem}.txt").write_text(stem)
    (deep / "link.jpg").symlink_to("a.jpg")
    path = tmp_path / "a.tar"
    command = ["tar", "--sort=name", f"--format={format}", "-cf", str(path), "-C", str(folder), "."]
    subprocess.run(command, check=True)
    assert by_index(path) == by_tarfile(path)
    assert len(build_index(path)) == 3


def test_global_pax_values_hold_for_all_members_until_their_own(tmp_path: Path) -> None:
    def pax(kind: bytes, name: str) -> bytes:
        return tarfile.TarInfo._create_pax_generic_header({"path": name}, kind, "utf-8")

    member = tarfile.TarInfo("x.jpg")
    path = tmp_path / "a.tar"
    blocks = [pax(b"g", "all.jpg"), member.tobuf(), pax(b"x", "own.jpg"), member.tobuf(), bytes(2 * BLOCK)]
    path.write_bytes(b"".join(blocks))
    assert build_index(path).keys == ["all", "own"]
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["all.jpg", "own.jpg"]


def test_times_in_gnu_headers_are_no_folder(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[345:357] = b"14112345670\0"  # atime, where ustar has its prefix
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) + bytes(2 * BLOCK))
    assert build_index(path).keys == ["a"]


def test_signed_checksums_of_old_tars_are_right() -> None:
    header = bytearray(tarfile.TarInfo("é.jpg").tobuf(tarfile.USTAR_FORMAT, "utf-8"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(b - 256 if b > 127 else b for b in header)
    assert checksum_is_right(bytes(header))
    header[0] ^= 1
    assert not checksum_is_right(bytes(header))


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("caf\udce9.jpg", b"x")], tarfile.GNU_FORMAT)
    assert build_index(path).keys == ["caf\\xe9"]


def test_metadata_and_hidden_files_and_folders_are_no_samples(tmp_path: Path) -> None:
    members = [("__meta__", b"m"), ("__meta__/x.jpg", b"m"), ("d/._a.jpg", b"mac"), ("d/a.jpg", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    assert by_index(path) == {"d/a": {"jpg": b"x"}}


def test_multi_dot_names_keep_their_suffix_as_extension(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("v1.0/a.seg.PNG", b"s"), ("v1.0/a.jpg", b"j")])
    assert by_index(path) == {"v1.0/a": {"seg.png": b"s", "jpg": b"j"}}


@pytest.mark.parametrize("wrong", [b"\xff", b"\0" * BLOCK], ids=["one byte", "zeroed page"])
@pytest.mark.parametrize("extension", ["jpg", "txt"])
def test_a_damaged_header_costs_its_sample_and_no_other(tmp_path: Path, extension: str, wrong: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", samples(1000))
    whole = by_index(path)
    overwrite(path, header_at(path, f"00300.{extension}"), wrong)
    del whole["00300"]
    assert by_index(path) == whole
    damage = build_index(path).damage
    assert len(damage) == 2
    assert "00300: dropped" in damage[1]


def test_a_size_beyond_the_file_costs_its_sample_and_no_other(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(20))
    whole = by_index(path)
    info = tarfile.TarInfo("00007.jpg")
    info.size = 1 << 60
    overwrite(path, header_at(path, "00007.jpg"), info.tobuf(tarfile.GNU_FORMAT))
    del whole["00007"]
    assert by_index(path) == whole
    assert any("00007" in line and str(1 << 60) in line for line in build_index(path).damage)


def test_every_cut_keeps_the_whole_samples_before_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(6))
    index, data = build_index(path), path.read_bytes()
    ends = [max(offset + size for offset, size in index.members(row).values()) for row in range(6)]
    cut = tmp_path / "cut.tar"
    for length in range(BLOCK, len(data) - 10_240, 100):
        cut.write_bytes(data[:length])
        kept = build_index(cut)
        whole = sum(end <= length for end in ends)
        # cut at the very edge of a member, nothing shows that the first sample of all was to have another
        assert kept.keys[max(whole, 1) :] == [] or (length < ends[0] and len(kept) == 1), length
        assert kept.keys[:whole] == index.keys[:whole], length
        assert kept.damage, length


def test_joined_tars_are_read_through(tmp_path: Path) -> None:
    first, second = (
        write_tar(tmp_path / "a.tar", [("a.jpg", b"1")]),
        write_tar(tmp_path / "b.tar", [("b.jpg", b"2")]),
    )
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert by_index(both) == {"a": {"jpg": b"1"}, "b": {"jpg": b"2"}}
    assert "seam" in build_index(both).damage[0]


def test_repeated_keys_and_extensions_keep_the_first_and_are_told(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3"), ("a.jpg", b"4"), ("a.txt", b"5")]
    path = write_tar(tmp_path / "a.tar", members)
    assert by_index(path) == {"a": {"jpg": b"1"}, "b": {"jpg": b"3"}}
    damage = build_index(path).damage
    assert len(damage) == 2
    assert all(line.startswith("a: ") for line in damage)


def test_damaged_pax_header_costs_its_sample_and_no_other(tmp_path: Path) -> None:
    name = "é" * 80
    members = [(f"{name}{i}.jpg", b"x" * 600) for i in range(4)]
    path = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    at = header_at(path, f"{name}1.jpg")
    overwrite(path, at + BLOCK, b"99999999 path=x\n")
    kept = build_index(path)
    assert f"{name}0" in kept.keys
    assert f"{name}3" in kept.keys
    assert any("pax" in line for line in kept.damage)


def test_an_empty_shard_is_allowed(tmp_path: Path) -> None:
    index = load_index(write_tar(tmp_path / "a.tar", []))
    assert (len(index), index.keys, index.damage, index.span(0, 0)) == (0, [], [], (0, 0))
    assert len(load_index(tmp_path / "a.tar")) == 0  # and from its sidecar


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100])
def test_what_is_no_tar_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"page\.tar is not a tar"):
        load_index(path)


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(3))
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar\.gz is compressed \(gzip\).*pretrain pack"):
        load_index(packed)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar cannot be read"):
        load_index(tmp_path / "gone.tar")


def test_span_block_and_keys_agree_with_members(tmp_path: Path) -> None:
    index = load_index(write_tar(tmp_path / "a.tar", samples(50, ("cls", "jpg", "txt"))))
    assert index.block(10, 20) == [index.members(row) for row in range(10, 20)]
    assert [index.key(row) for row in range(50)] == index.keys
    start, stop = index.span(10, 20)
    assert start == min(offset for offset, _ in index.members(10).values())
    assert stop == max(offset + size for offset, size in index.members(19).values())
    assert index.extension_counts() == {"cls": 50, "jpg": 50, "txt": 50}


def test_sidecar_is_used_until_the_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", samples(10))
    load_index(path)
    sidecar = sidecar_places(path)[0]
    assert sidecar.name == "a.tar.idx.npz"
    assert index_length(path) == 10
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.shards.index.walk", lambda *_: pytest.fail("the sidecar was not used"))
        assert len(load_index(path)) == 10
    write_tar(path, samples(11))
    assert len(load_index(path)) == 11
    assert index_length(path) == 11
    assert not list(tmp_path.glob(".idx-*"))


def test_torn_or_foreign_sidecars_are_made_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(10))
    keys, sidecar = load_index(path).keys, sidecar_places(path)[0]
    good = sidecar.read_bytes()
    for torn in (b"", good[: len(good) // 2], b"\0" * 100):
        sidecar.write_bytes(torn)
        assert load_index(path).keys == keys
    with np.load(sidecar, allow_pickle=False) as stored:
        arrays = dict(stored)
    for name, foreign in (
        ("offset", arrays["offset"] + (1 << 40)),  # outside the tar
        ("size", np.full_like(arrays["size"], 2**63 - 1)),
        ("size", arrays["size"].astype(float)),
        ("extension", arrays["extension"] + 99),
        ("extension", arrays["extension"][:3]),
        ("first", arrays["first"][::-1]),
        ("key_ends", arrays["key_ends"] * 1000),
    ):
        np.savez(sidecar, **arrays | {name: foreign})
        found = load_index(path)
        assert found.members(0)["jpg"][0] == BLOCK
        assert found.keys == keys


def test_a_read_only_folder_is_indexed_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        _read_only(tmp_path, monkeypatch, lambda folder: folder.chmod(0o555))
        return
    mounted: list[Path] = []

    def mount_read_only(folder: Path) -> None:  # root writes wherever the file system lets anyone
        for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
            if subprocess.run(["mount", *options], capture_output=True).returncode:
                pytest.skip("this machine lets nobody mount a read-only folder")
            mounted.append(folder)

    try:
        _read_only(tmp_path, monkeypatch, mount_read_only)
    finally:
        for folder in mounted[:1]:
            subprocess.run(["umount", folder], check=True)


def _read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    path = write_tar(folder / "a.tar", samples(10))
    monkeypatch.setenv("POLYVIEW_CACHE", str(tmp_path / "cache"))
    refuse(folder)
    assert len(load_index(path)) == 10
    assert list(folder.glob("*.npz")) == []
    assert len(list((tmp_path / "cache" / "shards").glob("a.tar-*.idx.npz"))) == 1
    monkeypatch.setattr("pretrain.shards.index.walk", lambda *_: pytest.fail("the cache was not used"))
    assert len(load_index(path)) == 10


def test_ten_thousand_samples_load_in_milliseconds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i:07d}.jpg", b"x") for i in range(10_000)])
    load_index(path)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        index = load_index(path)
        index.members(9_999)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05
