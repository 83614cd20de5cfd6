import numpy as np
import pytest

from pretrain.philox import key, philox, uniforms

# counter, key (low word first), output: Random123's kat_vectors for philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key64", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key64, output):
    low, high = words(key64)
    assert philox(np.array(words(counter), np.uint64), high << 32 | low).tolist() == words(output)


def test_rows_depend_on_their_own_keys_alone():
    ids = np.array([5, 2**40, 7])
    together = uniforms(1, np.array([0, 1, 2]), np.array([0, 3, 0]), ids, "crop", 5)
    assert np.array_equal(together[1], uniforms(1, 1, 3, [2**40], "crop", 5)[0])
    assert np.array_equal(together[::-1], uniforms(1, [2, 1, 0], [0, 3, 0], ids[::-1], "crop", 5))


def test_more_draws_keep_the_first():
    assert np.array_equal(uniforms(1, 0, 0, np.arange(9), "crop", 7)[:, :4], uniforms(1, 0, 0, np.arange(9), "crop", 4))
    assert uniforms(1, 0, 0, np.arange(9), "crop", 0).shape == (9, 0)
    assert uniforms(1, 0, 0, np.arange(0), "crop", 3).shape == (0, 3)


def test_every_key_changes_every_draw():
    plain = uniforms(1, 2, 3, [4], "crop", 6)
    others = [(2, 2, 3, [4], "crop"), (1, 1, 3, [4], "crop"), (1, 2, 1, [4], "crop"), (1, 2, 3, [5], "crop")]
    others += [(1, 2, 3, [4 + 2**32], "crop"), (1, 2, 3, [4], "flip"), (-1, 2, 3, [4], "crop")]
    draws = [plain, *(uniforms(*keys, 6) for keys in others)]
    assert len(np.unique(np.concatenate(draws))) == 6 * len(draws)


def test_uniforms_are_uniform_and_uncorrelated():
    draws = uniforms(0, 0, 0, np.arange(20_000), "crop", 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 64, (0, 1))[0]
    assert ((counts - 1250) ** 2 / 1250).sum() < 120  # chi-square, 63 degrees: p < 1e-5 beyond
    neighbours = np.corrcoef(np.concatenate([draws[1:], draws[:-1]], axis=1).T)
    assert np.abs(neighbours[np.triu_indices(8, 1)]).max() < 0.035


def test_uniforms_are_golden():
    golden = [
        [0.47798240840189044, 0.32778584439077185, 0.7974610769414645],
        [0.41013302728304635, 0.5480325268967216, 0.8563409669031264],
    ]
    assert uniforms(7, 3, 1, [11, 2**40], "crop", 3).tolist() == golden


def test_keys_are_golden_and_tell_their_parts_apart():
    assert key(7, "crop") == 298702549643616471
    assert len({key("ab", "c"), key("a", "bc"), key("abc"), key(1), key("1"), key(-1), key(1, 1), key()}) == 8
    assert key(np.int64(3)) == key(3)


@pytest.mark.parametrize(
    ("epoch", "source", "ids"), [(-1, 0, [0]), (0, 1 << 16, [0]), (0, 0, [3, -3]), (0, 0, [1 << 48])]
)
def test_keys_out_of_range_are_refused(epoch, source, ids):
    with pytest.raises(ValueError, match="must lie in"):
        uniforms(0, epoch, source, ids, "crop", 1)
