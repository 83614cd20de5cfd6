import itertools
import json
import logging
import math

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.order import ORDER_VERSION, SampleOrder
from pretrain.order.mixture import PERIOD
from pretrain.order.permutation import keyed_hash, permute


def shards(samples, each=100):
    """Lengths of shards that hold `samples`, the last one short."""
    return [each] * (samples // each) + ([samples % each] if samples % each else [])


def rows(order, steps, rank=0, world=1):
    """ids, source, epoch of all rows of `steps`, (steps, b) each."""
    return [np.stack(column) for column in zip(*(order.batch(step, rank, world) for step in steps))]


def assert_epochs_are_exact(order, sizes, steps):
    """Every (source, epoch, id) at most once, and every epoch that all lanes have left exactly once."""
    ids, source, epoch = rows(order, range(steps))
    complete = 0
    for d, size in enumerate(sizes):
        mine = source == d
        lanes = np.arange(order.global_batch) * order.lanes // order.global_batch
        latest = min((epoch[:, lanes == lane][mine[:, lanes == lane]].max(initial=0)) for lane in range(order.lanes))
        for e in np.unique(epoch[mine]):
            counts = np.bincount(ids[mine & (epoch == e)], minlength=size)
            assert len(counts) == size
            assert counts.max() == 1
            if e < latest:
                assert counts.min() == 1
                complete += 1
    return complete


# ---- permutations ----------------------------------------------------------------------------------------


def keys_of(count, seed=5):
    return keyed_hash(np.full(count, np.uint64(seed)), np.arange(count, dtype=np.uint64))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 97, 1000, 4096, 65537])
def test_permute_is_a_bijection_and_inverts(size):
    for key in keys_of(3):
        places, sizes, keys = np.arange(size), np.full(size, size), np.full(size, key)
        images = permute(places, sizes, keys)
        assert np.array_equal(np.sort(images), places)
        assert np.array_equal(permute(images, sizes, keys, inverse=True), places)


def test_permute_mixes_domains_in_one_call():
    sizes = np.array([1, 2, 9, 10**12, 5])
    places, keys = np.array([0, 1, 4, 10**11, 3]), keys_of(5)
    alone = [permute(places[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0] for i in range(5)]
    assert permute(places, sizes, keys).tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_all_permutations_of_a_small_domain_are_equally_likely(size):
    count = 60_000
    keys, sizes = keys_of(count), np.full(count, size)
    images = np.stack([permute(np.full(count, place), sizes, keys) for place in range(size)])
    code = (images * size ** np.arange(size)[:, None]).sum(0)
    assert chi_square(np.unique(code, return_counts=True)[1], math.factorial(size)) < 5


@pytest.mark.parametrize("size", [10, 17, 40])
def test_pairs_of_images_are_uniform(size):
    count = 60_000
    keys, sizes = keys_of(count), np.full(count, size)
    first, second = (permute(np.full(count, place), sizes, keys) for place in (0, size // 2))
    assert chi_square(np.unique(first * size + second, return_counts=True)[1], size * (size - 1)) < 5


def chi_square(counts, cells):
    """Standard deviations by which the chi-square of equal chances exceeds its mean."""
    expected = counts.sum() / cells
    value = ((counts - expected) ** 2 / expected).sum() + (cells - len(counts)) * expected
    return (value - (cells - 1)) / math.sqrt(2 * (cells - 1))


# ---- exactly once ----------------------------------------------------------------------------------------

CASES = [
    (7, 7, None, 4096),  # N = B
    (8, 7, None, 4096),  # N = B + 1, prime batch
    (97, 12, 10, 5),  # prime N, short block of 7, small windows
    (97, 12, 96, 4096),  # short block of one
    (97, 1, 200, 7),  # one block, longer than the line
    (1000, 64, None, 4096),
    (1000, 96, 7, 3),
    (997, 31, 16, 10),
    (
        523,
        521,
        None,
        4096,
    ),  # one lane: the batch's divisors are 1 and itself, and itself is above the lane bound
    (5000, 1024, None, 4),
    (4099, 30, 256, 64),
]


@pytest.mark.parametrize(("samples", "batch", "block", "window"), CASES)
def test_every_epoch_holds_every_sample_once(samples, batch, block, window):
    order = SampleOrder([shards(samples)], seed=3, global_batch=batch, block=block, window=window)
    steps = 3 * samples // batch + 2
    assert assert_epochs_are_exact(order, [samples], steps) >= 2


def test_every_epoch_is_exact_over_many_random_settings():
    draw = np.random.default_rng(0)
    for _ in range(60):
        samples = int(draw.integers(1, 400))
        batch, block, window = (int(draw.integers(1, top + 1)) for top in (samples, 40, 60))
        order = SampleOrder([shards(samples)], seed=1, global_batch=batch, block=block, window=window)
        assert assert_epochs_are_exact(order, [samples], 2 * samples // batch + 3) >= 1


def test_shard_bounds_do_not_matter():
    ids = [SampleOrder([s], seed=0, global_batch=8).batch(5).ids for s in ([100], [0, 37, 0, 63], [1] * 100)]
    assert np.array_equal(ids[0], ids[1])
    assert np.array_equal(ids[0], ids[2])


# ---- any world, any start --------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 24])
def test_worlds_share_one_global_batch(world):
    order = SampleOrder([shards(1003), shards(501)], seed=0, global_batch=48, weights=[0.3, 0.7])
    for step in (0, 1, 77):
        parts = [order.batch(step, rank, world) for rank in range(world)]
        for whole, column in zip(order.batch(step), zip(*parts)):
            assert np.array_equal(whole, np.concatenate(column))


def test_a_cold_step_equals_the_same_step_in_sequence():
    settings = {"seed": 9, "global_batch": 40, "weights": [1, 2], "segments": [(30, [2, 1])]}
    warm = SampleOrder([shards(400), shards(300)], **settings)
    sequence = [warm.batch(step) for step in range(60)]
    for step in (59, 31, 30, 29, 0):
        cold = SampleOrder([shards(400), shards(300)], **settings).batch(step)
        assert all(np.array_equal(a, b) for a, b in zip(cold, sequence[step]))


def test_two_billion_samples_open_at_any_step():
    order = SampleOrder([[10_000] * 200_000], seed=0, global_batch=4096)
    batch = order.batch(100_000)
    assert len(np.unique(batch.ids)) == 4096
    assert batch.ids.min() >= 0
    assert batch.ids.max() < 2 * 10**9
    assert set(order.batch(10**7).epoch) <= {20, 21}


def test_batch_types_are_those_of_the_contract():
    batch = SampleOrder([[10]], seed=0, global_batch=2).batch(0)
    assert [column.dtype for column in batch] == [np.int64, np.int32, np.int64]


# ---- shuffle quality -------------------------------------------------------------------------------------


def mates(order, shard, steps):
    """Mean number of rows of a batch that are of the same shard as a row, itself not counted."""
    counts = [np.bincount(order.batch(step).ids // shard) for step in steps]
    return np.mean([(c * (c - 1)).sum() / c.sum() for c in counts])


@pytest.mark.parametrize("batch", [32, 64, 100, 256, 500, 997])
def test_batches_of_a_small_set_mix_its_shards(batch):
    order = SampleOrder([[100] * 10], seed=0, global_batch=batch)
    assert mates(order, 100, range(2000 // batch + 60)) <= 1.1 * (batch - 1) * 99 / 999


@pytest.mark.parametrize("batch", [512, 768, 1024, 4096, 16384])
def test_batches_of_a_large_set_mix_its_shards(batch):
    order = SampleOrder([[10_000] * 1000], seed=0, global_batch=batch)
    steps = np.linspace(0, 3 * order.samples // batch, max(200_000 // batch, 40)).astype(int)
    assert mates(order, 10_000, steps.tolist()) <= 1.3 * (batch - 1) * 9_999 / 9_999_999


@pytest.mark.parametrize("batch", [4, 8, 100, 250])
def test_a_sample_forgets_when_it_came_last_epoch(batch):
    order = SampleOrder([[1000]], seed=0, global_batch=batch)
    ids, _, epoch = (column.ravel() for column in rows(order, range(6 * 1000 // batch)))
    steps = np.repeat(np.arange(6 * 1000 // batch), batch)
    times = np.full((4, 1000), -1)
    for e in range(4):
        times[e, ids[epoch == e]] = steps[epoch == e]
    assert times.min() >= 0
    for early, late in itertools.combinations(range(4), 2):
        assert abs(np.corrcoef(times[early], times[late])[0, 1]) < 0.13  # 4 standard deviations


def test_neighbours_part_from_epoch_to_epoch():
    order = SampleOrder([[1000]], seed=0, global_batch=50)
    ids, _, epoch = rows(order, range(45))
    pairs = []
    for e in range(2):
        together = np.zeros((1000, 1000), bool)
        for row in range(45):
            mine = ids[row][epoch[row] == e]
            together[np.ix_(mine, mine)] = True
        pairs.append(together & ~np.eye(1000, dtype=bool))
    chance = pairs[0].mean() * pairs[1].mean()
    assert (pairs[0] & pairs[1]).mean() < 1.15 * chance


def test_shuffles_differ_between_windows_lanes_and_epochs():
    order = SampleOrder([[1000]], seed=0, global_batch=4, block=1000, window=50)  # one block: windows alone shuffle
    ids = rows(order, range(500))[0]
    orders = ids.T.reshape(4, 10, 50) % 50  # (lanes, two epochs of five windows, place)
    for first, second in itertools.combinations(orders.reshape(40, 50), 2):
        assert (first == second).mean() < 0.25


def test_blocks_stand_elsewhere_each_epoch():
    order = SampleOrder([[1000]], seed=0, global_batch=4, block=10, window=1)  # windows of one: blocks alone move
    lines = rows(order, range(750))[0].T.reshape(4, 3, 250).swapaxes(0, 1).reshape(3, 1000)
    for first, second in itertools.combinations(lines, 2):
        assert (first == second).mean() < 0.1


def test_seeds_give_other_orders():
    first, second = (rows(SampleOrder([[1000]], seed=s, global_batch=100), range(9))[0] for s in (0, 1))
    assert (first == second).mean() < 0.01


def test_few_lanes_over_a_long_source_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        SampleOrder([[10**7]], seed=0, global_batch=4096)
        SampleOrder([[1000]], seed=0, global_batch=997)
        assert not caplog.records
        SampleOrder([[10**7]], seed=0, global_batch=997)
    assert "multiple of 64" in caplog.text


# ---- several sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.9, 0.1], [1 / 3, 2 / 3], [0.123, 0.877], [0.05, 0.25, 0.7], None])
def test_every_batch_and_every_rank_has_the_mix(weights):
    sizes = [500, 1700, 1300][: len(weights or [0, 0])]
    share = np.array(weights or sizes) / sum(weights or sizes)
    order = SampleOrder([shards(n) for n in sizes], seed=0, global_batch=100, weights=weights)
    for step, world in itertools.product([0, 1, 2, 50, 99, 101, 12345], [1, 4]):
        for rank in range(world):
            counts = np.bincount(order.batch(step, rank, world).source, minlength=len(sizes))
            assert np.abs(counts - share * 100 / world).max() <= 2


def test_every_source_keeps_its_own_exact_epochs():
    sizes = [97, 211, 50]
    order = SampleOrder([shards(n) for n in sizes], seed=4, global_batch=30, weights=[0.2, 0.3, 0.5], block=8, window=5)
    assert assert_epochs_are_exact(order, sizes, 60) >= 9


def test_sources_of_one_size_have_orders_of_their_own():
    order = SampleOrder([[500], [500]], seed=0, global_batch=100)
    ids, source, _ = rows(order, range(11))
    lines = [[ids[source[:, c] == d, c][:5].tolist() for c in range(100)] for d in range(2)]  # epoch 0, lane by lane
    assert (np.array(lines[0]) == np.array(lines[1])).mean() < 0.1


def test_no_source_is_starved_by_proportion():
    order = SampleOrder([[10**8], [10]], seed=0, global_batch=1000)
    _, source, _ = rows(order, range(PERIOD * order.lanes // 1000))
    assert (source == 1).sum() >= 1


def test_one_source_is_the_special_case_of_several():
    alone = SampleOrder([[300]], seed=0, global_batch=20)
    paused = SampleOrder([[300], [300]], seed=0, global_batch=20, weights=[1, 0])
    assert all(np.array_equal(a, b) for a, b in zip(alone.batch(33), paused.batch(33)))


def test_segments_keep_the_exact_epochs_of_each_source():
    segments = [(13, [0.8, 0.2]), (29, [0, 1]), (37, [0.5, 0.5])]
    order = SampleOrder([shards(120), shards(90)], seed=0, global_batch=24, weights=[0.3, 0.7], segments=segments)
    assert assert_epochs_are_exact(order, [120, 90], 70) >= 10
    _, source, _ = rows(order, range(70))
    for first, last, share in [(0, 13, 0.7), (13, 29, 0.2), (29, 37, 1), (37, 70, 0.5)]:
        assert abs(source[first:last].mean() - share) < 0.03


def test_a_segment_changes_nothing_before_it():
    plain = SampleOrder([[400], [400]], seed=0, global_batch=40)
    changed = SampleOrder([[400], [400]], seed=0, global_batch=40, segments=[(20, [0.9, 0.1])])
    assert all(np.array_equal(a, b) for a, b in zip(plain.batch(19), changed.batch(19)))
    assert not np.array_equal(plain.batch(20).source, changed.batch(20).source)


# ---- digest and resume -----------------------------------------------------------------------------------


def test_digest_tells_every_setting_apart():
    plain = {"sources": [[60, 40], [80]], "seed": 0, "global_batch": 20}
    changes = [{}, {"sources": [[40, 60], [80]]}, {"seed": 1}, {"global_batch": 10}, {"weights": [0.4, 0.6]}]
    changes += [{"segments": [(5, [1, 1])]}, {"block": 3}, {"window": 9}]
    digests = [SampleOrder(**{**plain, **change}).digest() for change in changes]
    assert len(set(digests)) == len(changes)
    assert SampleOrder(**plain).digest() == digests[0]
    assert SampleOrder(**plain, weights=[5, 4]).digest() == digests[0]  # the proportional weights, spelt out


def test_a_resume_accepts_appended_segments_and_names_what_differs():
    sources, settings = [[100], [100]], {"seed": 0, "global_batch": 20}
    saved = json.loads(json.dumps(SampleOrder(sources, **settings).description()))
    SampleOrder(sources, **settings).check_continues(saved, 50)
    SampleOrder(sources, **settings, segments=[(50, [1, 0])]).check_continues(saved, 50)
    for name, other in {
        "mix": SampleOrder(sources, **settings, segments=[(49, [1, 0])]),
        "seed": SampleOrder(sources, seed=1, global_batch=20),
        "sources": SampleOrder([[100], [50, 50]], **settings),
        "global_batch": SampleOrder(sources, seed=0, global_batch=40),
    }.items():
        with pytest.raises(UserError, match=f"up to step 50: .*{name} was"):
            other.check_continues(saved, 50)


def test_a_resume_refuses_a_segment_taken_away():
    long = SampleOrder([[100], [100]], seed=0, global_batch=20, segments=[(30, [1, 0])])
    with pytest.raises(UserError, match="mix was"):
        SampleOrder([[100], [100]], seed=0, global_batch=20).check_continues(long.description(), 50)
    SampleOrder([[100], [100]], seed=0, global_batch=20).check_continues(long.description(), 30)


def test_epoch_of_counts_samples_seen():
    order = SampleOrder([[100], [60]], seed=0, global_batch=20)
    assert order.samples == 160
    assert order.epoch_of(12) == 1.5


def test_order_is_golden():
    """Whoever changes these figures raises ORDER_VERSION: runs in progress would go on with other batches."""
    assert ORDER_VERSION == 1
    single = SampleOrder([[400, 0, 603]], seed=11, global_batch=6)
    assert [single.batch(step).ids.tolist() for step in (0, 1, 400)] == [
        [612, 712, 674, 152, 212, 61],
        [585, 910, 732, 85, 996, 905],
        [723, 7, 626, 927, 289, 666],
    ]
    mixed = SampleOrder(
        [[70_000, 53_456], [9_999]],
        seed=12,
        global_batch=6,
        weights=[0.6, 0.4],
        segments=[(1000, [0.2, 0.8])],
    )
    assert [[column.tolist() for column in mixed.batch(step)] for step in (999, 123_456)] == [
        [[75697, 35146, 5253, 46945, 6361, 121492], [0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]],
        [[7028, 102506, 9372, 7179, 3991, 8067], [1, 0, 1, 1, 1, 1], [59, 1, 59, 59, 59, 59]],
    ]
    assert single.digest() == "67c21a13f8a83d5b5ffea600cd864f99e9e4e46a0651e51f9449cb4943312ad3"
    assert mixed.digest() == "b390855aaa886e1aa5ac1f596130be2a9b28fdba24fba6feca8411bb00f22a26"


# ---- refusals --------------------------------------------------------------------------------------------


def test_a_world_that_does_not_divide_is_refused_with_what_works():
    order = SampleOrder([[10_000]], seed=0, global_batch=4096)
    with pytest.raises(UserError, match=r"4096 does not divide among 24 ranks: .* 4080 or 4104, or 16 or 32 ranks"):
        order.batch(0, 0, 24)
    with pytest.raises(UserError, match="global batch of 5000, or 4096 ranks"):
        order.batch(0, 0, 5000)
    with pytest.raises(UserError, match="at least 1"):
        order.batch(0, 0, 0)


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ([[10, 10]], {"global_batch": 21}, "larger than the 20 samples"),
        ([], {}, "0 sources"),
        ([[10], []], {}, "source 1 has no shards"),
        ([[10], [0, 0]], {}, "source 1: 2 shards hold 0 samples"),
        ([[10, -1]], {}, "source 0 must be"),
        ([10, 10], {}, "source 0 must be"),
        ([[1.5]], {}, "source 0 must be"),
        ([[10]], {"global_batch": 0}, "global batch must be at least 1"),
        ([[10]], {"window": 0}, "window must be at least 1"),
        ([[10]], {"block": 0}, "block must be at least 1"),
        ([[10], [10]], {"weights": [1]}, "1 weights for 2 sources"),
        ([[10], [10]], {"weights": [1, -1]}, "none negative"),
        ([[10], [10]], {"weights": [1, float("nan")]}, "must be finite"),
        ([[10], [10]], {"weights": [0, 0]}, "not all zero"),
        ([[10], [10]], {"weights": [1, 1e-6]}, "source 1 has a share of 1e-06"),
        ([[100], [10]], {"global_batch": 20, "weights": [0.1, 0.9]}, "source 1 has 10 samples, and 18 rows"),
        ([[10], [10]], {"segments": [(5, [1, 0]), (4, [0, 1])]}, "rising steps"),
        ([[10], [10]], {"segments": [(5, [1, 0, 0])]}, "segment from step 5: 3 weights"),
    ],
)
def test_what_cannot_be_ordered_is_refused(sources, settings, message):
    with pytest.raises(UserError, match=message):
        SampleOrder(sources, **{"seed": 0, "global_batch": 2, **settings})


def test_callers_mistakes_are_refused():
    order = SampleOrder([[10]], seed=0, global_batch=2)
    with pytest.raises(ValueError, match="step"):
        order.batch(-1)
    with pytest.raises(ValueError, match="rank"):
        order.batch(0, 2, 2)
