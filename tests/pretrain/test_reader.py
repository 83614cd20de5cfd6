"""The reader's batches depend on the step alone, and nothing wrong with a sample or a shard is silent."""

from __future__ import annotations

import gc
import io
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.errors import UserError
from pretrain.order import SampleOrder
from pretrain.reader import Reader, assembly
from pretrain.reader.batch import Batch
from pretrain.shards.source import Source, open_source
from pretrain.views.spec import ImageView, TextView
from pretrain.views.tokenizer import ClipTokenizer

VIEWS = (ImageView("first", 16, scale=(0.3, 1.0), flip=0.5), ImageView("second", 8))
TEXT = (TextView(),)
TOKENIZER = ClipTokenizer(12)


def picture(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((30 + seed % 5, 24), Image.BICUBIC).save(out, kind)
    return out.getvalue()


def good(i: int) -> dict[str, bytes]:
    return {
        "jpg": picture(i),
        "txt": f"sample {i}\nthe {i}th picture\n\nwith \\n a break".encode(),
        "json": b"{}" * 3000,
        "cls": str(i % 4).encode(),
    }


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_source(folder: Path, counts: tuple[int, ...], changed: dict[int, dict[str, bytes]] | None = None) -> Source:
    """Shards of `counts` samples; sample i has the members `changed[i]` where given."""
    folder.mkdir(parents=True)
    start = 0
    for shard, count in enumerate(counts):
        names = range(start, start + count)
        write_tar(folder / f"{shard}.tar", {f"s{i:03d}": (changed or {}).get(i, good(i)) for i in names})
        start += count
    return open_source(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Source]:
    folder = tmp_path_factory.mktemp("reader")
    return [write_source(folder / "a", (20, 0, 7, 33)), write_source(folder / "b", (30,))]


def make(sources: list[Source], *, batch: int = 12, block: int | None = 4, **options) -> Reader:
    order = SampleOrder([s.lengths for s in sources], seed=3, global_batch=batch, block=block, window=16)
    options = {"seed": 3, "threads": 2, **options}
    return Reader(sources, order, VIEWS, TEXT, TOKENIZER, **options)


def collect(sources: list[Source], start: int, stop: int, **options) -> list[Batch]:
    with make(sources, **options) as reader:
        return list(reader.stream(start, stop))


def assert_same(a: Batch, b: Batch) -> None:
    assert (a.step, a.keys, a.captions, a.damaged) == (b.step, b.keys, b.captions, b.damaged)
    for name in ("ids", "source", "epoch", "weight", "labels"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for x, y in ((a.images, b.images), (a.tokens, b.tokens), (a.present, b.present)):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)
    assert a.regions.keys() == b.regions.keys()
    for name in a.regions:
        assert all(map(torch.equal, a.regions[name], b.regions[name]))


# ----------------------------------------------------------------------------------------------------
# what a batch holds


def test_batch_holds_what_the_views_asked_for(sources):
    batch = collect(sources, 5, 6)[0]
    assert batch.step == 5
    assert len(batch) == 12
    assert batch.images["first"].shape == (12, 3, 16, 16)
    assert batch.images["second"].shape == (12, 3, 8, 8)
    assert batch.images["first"].dtype == torch.uint8
    assert torch.equal(batch.tokens["caption"], TOKENIZER(batch.captions["caption"]))
    assert torch.equal(batch.weight, torch.ones(12))
    for row in range(12):
        key = sources[batch.source[row]].key(int(batch.ids[row]))
        number = int(key[1:])
        assert batch.keys[row] == key
        assert batch.labels[row] == number % 4
        assert batch.captions["caption"][row] in (
            f"sample {number}",
            f"the {number}th picture",
            "with \n a break",
        )


def test_an_epoch_draws_all_captions_and_other_crops_each_time(sources):
    batches = collect(sources[:1], 0, 10)  # 60 samples, twice
    drawn = {text.split(" ")[0] for batch in batches for text in batch.captions["caption"]}
    assert drawn == {"sample", "the", "with"}
    crops: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for key, pixels in zip(batch.keys, batch.images["first"]):
            crops.setdefault(key, []).append(pixels)
    assert {len(pair) for pair in crops.values()} == {2}
    assert sum(torch.equal(*pair) for pair in crops.values()) < 5


def test_a_view_does_not_change_another_one(sources):
    order = SampleOrder([s.lengths for s in sources], seed=3, global_batch=12, block=4, window=16)
    with Reader(sources, order, VIEWS[:1], (), None, seed=3) as reader:
        alone = reader.batch(2)
    assert alone.tokens == {}
    assert torch.equal(alone.images["first"], collect(sources, 2, 3)[0].images["first"])


def test_text_alone_needs_no_image(tmp_path):
    source = write_source(tmp_path / "text", (8,), {i: {"txt": b"only words"} for i in range(8)})
    order = SampleOrder([source.lengths], seed=0, global_batch=8)
    with Reader([source], order, (), TEXT, TOKENIZER, seed=0) as reader:
        batch = reader.batch(0)
    assert batch.weight.sum() == 8
    assert batch.images == {}
    assert batch.labels.tolist() == [-1] * 8


def test_rows_cut_a_batch_and_to_moves_it(tmp_path):
    source = write_source(tmp_path / "s", (12,), {4: {"txt": b"no image"}})
    batch = collect([source], 0, 1, max_damaged=1)[0]
    row = batch.keys.index("s004")
    part = batch.rows(row, row + 1).to("cpu")
    assert part.keys == ["s004"]
    assert part.weight.tolist() == [0]
    assert part.damaged[0]["row"] == 0
    assert part.images["first"].shape == (1, 3, 16, 16)
    assert part.captions["caption"] == batch.captions["caption"][row : row + 1]
    assert batch.rows(0, row).damaged == []


def test_uid_tells_sources_apart(sources):
    batches = collect(sources, 0, 15)
    uid = torch.cat([batch.uid for batch in batches])
    pairs = {(int(s), int(i)) for batch in batches for s, i in zip(batch.source, batch.ids)}
    assert len(uid.unique()) == len(pairs) > 60


# ----------------------------------------------------------------------------------------------------
# a batch depends on the step alone


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_are_the_global_batch(sources, world):
    whole = collect(sources, 0, 4)
    parts = [collect(sources, 0, 4, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        ranks = [part[step] for part in parts]
        assert [key for rank in ranks for key in rank.keys] == batch.keys
        assert torch.equal(torch.cat([rank.ids for rank in ranks]), batch.ids)
        for view in VIEWS:
            assert torch.equal(torch.cat([rank.images[view.name] for rank in ranks]), batch.images[view.name])
        assert torch.equal(torch.cat([rank.tokens["caption"] for rank in ranks]), batch.tokens["caption"])


@pytest.mark.parametrize("options", [{"threads": 1, "prefetch": 0}, {"threads": 4, "prefetch": 5}, {"cache_bytes": 0}])
def test_threads_prefetch_and_cache_change_nothing(sources, options):
    for a, b in zip(collect(sources, 0, 12), collect(sources, 0, 12, **options), strict=True):
        assert_same(a, b)


def test_resumed_stream_and_single_batches_are_the_same(sources):
    whole = collect(sources, 0, 9)
    for a, b in zip(whole[4:], collect(sources, 4, 9), strict=True):
        assert_same(a, b)
    with make(sources) as reader:
        for step in (7, 0, 7, 3):
            assert_same(reader.batch(step), whole[step])


def test_two_streams_of_one_reader_run_side_by_side(sources):
    whole = collect(sources, 0, 6)
    with make(sources) as reader:
        for a, b, expected in zip(reader.stream(0, 6), reader.stream(0, 6), whole, strict=True):
            assert_same(a, expected)
            assert_same(b, expected)


# ----------------------------------------------------------------------------------------------------
# reading


@pytest.mark.parametrize("block", [1, 4, 256])
def test_each_wanted_byte_is_read_once_an_epoch(tmp_path, block):
    source = write_source(tmp_path / "s", (25, 35))
    wanted = sum(len(good(i)[e]) for i in range(60) for e in ("jpg", "txt", "cls"))
    gaps = 60 * 2 * 2048  # headers and padding between members that are read in one go
    with make([source], block=block) as reader:
        assert reader.blocks.whole
        list(reader.stream(0, 5))
        assert wanted <= reader.blocks.bytes_read <= wanted + gaps
        reads = reader.blocks.reads
        list(reader.stream(5, 15))
        assert reader.blocks.reads == reads, "later epochs come from the cache"
    with make([source], block=block, cache_bytes=0) as reader:
        assert not reader.blocks.whole
        list(reader.stream(0, 5))
        assert wanted <= reader.blocks.bytes_read <= wanted + gaps
        list(reader.stream(5, 10))
        assert reader.blocks.bytes_read <= 2 * (wanted + gaps)


def test_cache_keeps_to_its_bytes(tmp_path):
    source = write_source(tmp_path / "s", (60,))
    with make([source], block=2) as reader:
        reader.blocks._budget = 20_000  # after it chose to read whole blocks
        list(reader.stream(0, 5))
        assert 0 < reader.blocks._held_bytes <= 20_000
        assert sum(size for _, size in reader.blocks._held.values()) == reader.blocks._held_bytes


def test_shard_cut_short_after_indexing_is_named(tmp_path):
    source = write_source(tmp_path / "s", (12,))
    source.index(0)
    tar = tmp_path / "s" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:30_000])
    with pytest.raises(UserError, match=r"0\.tar ends before byte \d+.*sample s\d+.*cut short"):
        collect([source], 0, 1)


def test_shard_that_vanishes_is_named(tmp_path):
    source = write_source(tmp_path / "s", (12,))
    source.index(0)
    with make([source]) as reader:
        (tmp_path / "s" / "0.tar").unlink()
        with pytest.raises(UserError, match=r"0\.tar, sample s\d+: .* cannot be read: .*No such file"):
            reader.batch(0)


# ----------------------------------------------------------------------------------------------------
# damage


BAD = {
    1: ({"jpg": b"", "txt": b"x"}, "image is empty"),
    2: ({"jpg": picture(2)[:200], "txt": b"x"}, "image cannot be decoded"),
    5: ({"jpg": b"<html>gone</html>", "txt": b"x"}, "not an image"),
    6: ({"txt": b"x"}, "no image"),
    9: ({"jpg": picture(9)}, "no caption: the sample has no .txt"),
    10: ({"jpg": picture(10), "txt": b"caf\xe9"}, "caption is not UTF-8 (.txt, byte 3)"),
    14: ({"jpg": picture(14), "txt": b" \n\n"}, "no caption: .txt is empty"),
    17: ({"jpg": picture(17), "txt": b"x", "cls": b"cat"}, "class is not a number: .cls holds b'cat'"),
}


def test_damaged_rows_weigh_nothing_and_are_told_once(tmp_path):
    source = write_source(tmp_path / "s", (10, 26), {i: members for i, (members, _) in BAD.items()})
    told: list[dict] = []
    batches = collect([source], 0, 3, max_damaged=1, on_damage=told.append)
    assert told == [damage for batch in batches for damage in batch.damaged]
    assert sorted(damage["key"] for damage in told) == [f"s{i:03d}" for i in sorted(BAD)]
    for damage in told:
        number = int(damage["key"][1:])
        batch, row = batches[damage["step"]], damage["row"]
        assert damage["reason"].startswith(BAD[number][1])
        assert damage["shard"].endswith("0.tar" if number < 10 else "1.tar")
        assert damage["id"] == number == batch.ids[row]
        assert damage["source"] == 0
        assert batch.keys[row] == damage["key"]
        assert batch.weight[row] == 0
        assert batch.labels[row] == -1
        stand_in = next((row + k) % 12 for k in range(12) if batch.weight[(row + k) % 12] == 1)
        for pixels in batch.images.values():
            assert torch.equal(pixels[row], pixels[stand_in])
        assert torch.equal(batch.tokens["caption"][row], batch.tokens["caption"][stand_in])
    assert sum(batch.weight.sum() for batch in batches) == 36 - len(BAD)


def test_other_images_are_read_under_any_name(tmp_path):
    kinds = {
        0: {"jpg": picture(0, "PNG")},
        1: {"webp": picture(1, "WEBP")},
        2: {"JPEG": picture(2)},
        3: {"png": picture(3)},
    }
    source = write_source(tmp_path / "s", (4,), {i: {**members, "txt": b"x"} for i, members in kinds.items()})
    assert collect([source], 0, 1, batch=4)[0].damaged == []


def test_batch_without_a_good_row_is_black(tmp_path):
    source = write_source(tmp_path / "s", (12,), {i: {"jpg": b"broken", "txt": b"x"} for i in range(12)})
    batch = collect([source], 0, 1, max_damaged=1)[0]
    assert not batch.weight.any()
    assert not batch.images["first"].any()
    assert torch.equal(batch.tokens["caption"], TOKENIZER([""] * 12))
    assert len(batch.damaged) == 12


def test_too_much_damage_stops_at_the_same_batch_with_a_list(tmp_path):
    changed = {i: {"jpg": b"broken", "txt": b"x"} for i in range(0, 36, 3)}
    source = write_source(tmp_path / "s", (36,), changed)
    stops = []
    for threads in (1, 4):
        told: list[dict] = []
        with make([source], threads=threads, max_damaged=0.01, on_damage=told.append) as reader:
            seen = []
            with pytest.raises(UserError, match=r"of \d+ rows .* damaged, more than max_damaged = 0.01") as raised:
                seen.extend(batch.step for batch in reader.stream(0, 100))
        assert f"{source.shards[0]}: {told[0]['key']}: not an image" in str(raised.value)
        assert len(told) > 10  # of the first 1,000 rows
        stops.append(len(told))
    assert stops[0] == stops[1]


def test_one_bad_sample_stops_no_run_unless_none_are_allowed(tmp_path):
    source = write_source(tmp_path / "s", (12,), {3: {"jpg": b"broken", "txt": b"x"}})
    assert len(collect([source], 0, 5)) == 5
    with pytest.raises(UserError, match="1 of 12 rows"):
        collect([source], 0, 5, max_damaged=0)


# ----------------------------------------------------------------------------------------------------
# threads


def reader_threads() -> int:
    return sum(thread.name.startswith("reader") for thread in threading.enumerate())


def test_error_in_a_thread_reaches_the_consumer_with_its_sample(sources, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(assembly, "random_resized_crop", broken)
    with make(sources) as reader:
        with pytest.raises(ZeroDivisionError) as raised:
            next(reader.stream(0, 5))
        assert "of shard" in raised.value.__notes__[0]
        assert ".tar, step " in raised.value.__notes__[0]


def test_consumer_that_stops_early_leaves_nothing_behind(sources):
    reader = make(sources, threads=3)
    stream = reader.stream(0, 1000)
    next(stream)
    stream.close()
    assert reader._jobs == set()
    assert reader.batch(1).step == 1, "the reader goes on"
    reader.close()
    reader.close()
    assert reader_threads() == 0
    with pytest.raises(RuntimeError, match="closed"):
        reader.batch(0)


def test_closing_frees_a_waiting_consumer(sources, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(assembly, "decode", lambda *_, **__: release.wait(20))
    reader, raised = make(sources), []

    def consume():
        try:
            next(reader.stream(0, 3))
        except RuntimeError as error:
            raised.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    while not reader._jobs:
        time.sleep(0.001)
    closer = threading.Thread(target=reader.close)
    closer.start()
    consumer.join(10)
    assert raised == ["the reader was closed"]
    release.set()
    closer.join(10)
    assert not closer.is_alive()


def test_closing_at_any_moment_frees_the_consumer(sources):
    for attempt in range(60):
        reader, raised = make(sources, batch=4, prefetch=attempt % 3), []

        def consume(reader=reader, raised=raised):
            try:
                for _ in reader.stream(0, 10**6):
                    pass
            except RuntimeError as error:
                raised.append(str(error))

        consumer = threading.Thread(target=consume, daemon=True)
        consumer.start()
        time.sleep(attempt * 5e-5)
        reader.close()
        consumer.join(10)
        assert raised == ["the reader was closed"]


def test_reader_let_go_ends_its_threads(sources):
    reader = make(sources)
    stream = reader.stream(0, 100)
    next(stream)
    del stream, reader
    gc.collect()
    for _ in range(500):
        if not reader_threads():
            return
        time.sleep(0.01)
    pytest.fail("threads of a reader that was let go still run")


def test_no_more_is_made_ahead_than_prefetch(sources):
    with make(sources, prefetch=2) as reader:
        stream = reader.stream(0, 100)
        for _ in range(3):
            next(stream)
            assert len(reader._jobs) == 2
        assert [batch.step for batch in stream] == list(range(3, 100))


def test_data_wait_is_counted_and_set_back(sources, monkeypatch):
    slow = assembly.decode
    monkeypatch.setattr(assembly, "decode", lambda data, **o: (time.sleep(0.005), slow(data, **o))[1])
    with make(sources, threads=1, prefetch=0) as reader:
        next(reader.stream(0, 1))
        assert reader.data_wait_s() >= 0.05
        assert reader.data_wait_s() == 0


@pytest.mark.parametrize(("wrong", "message"), [({"threads": 0}, "threads"), ({"prefetch": -1}, "prefetch")])
def test_wrong_settings_are_refused(sources, wrong, message):
    with pytest.raises(UserError, match=message):
        make(sources, **wrong)


def test_views_must_have_their_own_names(sources):
    order = SampleOrder([s.lengths for s in sources], seed=0, global_batch=4)
    with pytest.raises(UserError, match="two views are named first"):
        Reader(sources, order, (VIEWS[0], VIEWS[0]), (), None, seed=0)
    with pytest.raises(UserError, match=r"model\.text: null"):
        Reader(sources, order, VIEWS, TEXT, None, seed=0)


# ----------------------------------------------------------------------------------------------------
# real photographs


@pytest.mark.real
def test_real_photographs_and_captions(real_data, tmp_path):
    captions: dict[str, list[str]] = {}
    for line in (real_data / "flickr1k" / "captions.tsv").read_text().splitlines()[1:]:
        image, caption = line.split("\t")
        captions.setdefault(image, []).append(caption)
    files = {file.name: file for file in (real_data / "flickr1k").rglob("*.jpg")}
    chosen = sorted(captions)[:48]
    samples = {n[:-4]: {"jpg": files[n].read_bytes(), "txt": "\n".join(captions[n]).encode()} for n in chosen}
    write_tar(tmp_path / "0.tar", samples)
    source = open_source(tmp_path)
    order = SampleOrder([source.lengths], seed=0, global_batch=16)
    with Reader([source], order, (ImageView("image", 224),), TEXT, ClipTokenizer(), seed=0) as reader:
        batches = list(reader.stream(0, 3))
    assert sorted(key for batch in batches for key in batch.keys) == sorted(samples)
    for batch in batches:
        assert batch.damaged == []
        assert batch.images["image"].float().std() > 20
        for key, caption in zip(batch.keys, batch.captions["caption"]):
            assert caption in [text.strip() for text in captions[f"{key}.jpg"]]
