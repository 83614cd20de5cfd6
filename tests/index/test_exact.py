"""exact_topk against brute force in float64: every kernel, ties, edges, and what it refuses."""

from __future__ import annotations

import threading

import faiss
import numpy as np
import pytest
import torch

from index.errors import BadInput
from index.search import device, exact, exact_topk
from index.search.bank import Bank
from index.search.device import DeviceBank


def brute(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(np.float64) @ bank.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def same(found: tuple, expected: tuple) -> None:
    np.testing.assert_array_equal(np.asarray(found[1]), expected[1])
    np.testing.assert_array_equal(np.asarray(found[0]), expected[0])


def rows(n: int, d: int = 24, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


BANK = rows(5000)


@pytest.mark.parametrize("batch", [1, 3, 4, 8, 70])  # scan, BLAS, several threads
@pytest.mark.parametrize("k", [1, 10, 300])
def test_equals_brute_force_at_every_batch(batch, k):
    queries = rows(batch, seed=1)
    same(exact_topk(queries, BANK, k), brute(queries, BANK, k))


def test_more_queries_than_a_pass():
    queries = rows(1100, seed=1)
    same(exact_topk(queries, BANK, 5), brute(queries, BANK, 5))


@pytest.mark.parametrize("batch", [1, 6])
def test_equal_rows_come_by_lower_id(batch):
    bank = BANK.copy()
    bank[4000:4600] = bank[17]  # more equal rows than any candidate list holds
    bank[100:103] = bank[50]
    queries = np.concatenate([bank[17:18], bank[50:51], rows(batch, seed=2)])[:batch]
    found = exact_topk(queries, bank, 10)
    same(found, brute(queries, bank, 10))
    assert found[1][0].tolist() == [17, *range(4000, 4009)]


@pytest.mark.parametrize("batch", [1, 40])
def test_candidates_decide_where_rows_are_not_alike(batch, monkeypatch):
    """No slow float64 pass over all rows, which would hide a wrong candidate kernel."""
    monkeypatch.setattr(exact, "_whole_pass", lambda *_: pytest.fail("the certificate was not met"))
    monkeypatch.setattr(device, "SCORES", 1)  # several blocks
    queries = rows(batch, seed=1)
    for bank in (BANK, Bank([BANK[:2000], BANK[2000:]]), DeviceBank(torch.from_numpy(BANK))):
        same(exact_topk(queries, bank, 10), brute(queries, BANK, 10))
    halves = Bank([BANK[:2000].astype(np.float16), BANK[2000:].astype(np.float16)])
    same(exact_topk(queries, halves, 10), brute(queries, BANK.astype(np.float16), 10))


def test_a_collapsed_bank_gives_the_first_rows():
    bank = np.tile(rows(1), (40_000, 1))
    assert exact_topk(bank[:5].copy(), bank, 4)[1].tolist() == [[0, 1, 2, 3]] * 5


@pytest.mark.parametrize("spread", [2e-6, 2e-7, 2e-8])
@pytest.mark.parametrize("batch", [1, 5])
def test_nearly_equal_rows_are_told_apart(batch, spread):
    """Differences about or below the error of a float32 product."""
    noise = np.random.default_rng(3).standard_normal((20_000, 256)).astype(np.float32)
    bank = np.ones((20_000, 256), np.float32) / 16 + np.float32(spread) * noise
    queries = rows(batch, 256, seed=4)
    same(exact_topk(queries, bank, 10), brute(queries, bank, 10))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bank_of_any_float_also_read_only_and_strided(dtype):
    bank = BANK.astype(dtype)
    bank.flags.writeable = False
    queries = rows(6, seed=1).astype(dtype)
    q, b = queries.astype(np.float32), bank.astype(np.float32)
    same(exact_topk(queries, bank, 7), brute(q, b, 7))
    same(exact_topk(queries[::2], bank[::2], 7), brute(q[::2], b[::2], 7))


def test_several_arrays_are_one_line(tmp_path):
    np.save(tmp_path / "a.npy", BANK[:20].astype(np.float16))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    parts = [mapped, np.empty((0, 24), np.float16), BANK[20:].astype(np.float16)]
    queries = rows(9, seed=1)
    same(exact_topk(queries, Bank(parts), 12), brute(queries, BANK.astype(np.float16), 12))


def test_equal_rows_in_several_arrays_come_by_lower_id():
    one = BANK[:1].astype(np.float16)
    parts = [np.tile(one, (n, 1)) for n in (30, 17_000, 200)]
    queries = np.tile(one, (5, 1)).astype(np.float32)
    assert exact_topk(queries, Bank(parts), 40)[1].tolist() == [list(range(40))] * 5


def test_tensors_give_tensors():
    queries = rows(5, seed=1)
    scores, ids = exact_topk(torch.from_numpy(queries), torch.from_numpy(BANK), 6)
    assert isinstance(scores, torch.Tensor)
    assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)
    same((scores, ids), brute(queries, BANK, 6))


@pytest.mark.parametrize("batch", [1, 40])
def test_the_gpu_bank_decides_the_same(batch):
    """Its code, on the CPU: `DeviceBank` only asks where the tensor lies."""
    bank = BANK.copy()
    bank[3000:3400] = bank[7]
    queries = np.concatenate([bank[7:8], rows(batch, seed=1)])
    same(exact_topk(queries, DeviceBank(torch.from_numpy(bank)), 11), brute(queries, bank, 11))


def test_the_gpu_bank_survives_coarse_products():
    """With factors cut to 8 bits of mantissa in the first pass the answer stays exact."""

    class Coarse(DeviceBank):
        def candidates(self, queries, count):
            cut = torch.from_numpy(queries).bfloat16().float() @ self._all.bfloat16().float().T
            top = cut.topk(count)
            return top.values.numpy(), top.indices.numpy()

    bank, queries = Coarse(torch.from_numpy(BANK)), rows(30, seed=1)
    bank.extra = 2.0**-7
    same(exact_topk(queries, bank, 10), brute(queries, BANK, 10))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    queries = rows(40, seed=1)
    for k in (1, 10, 300):
        same(exact_topk(queries, BANK, k, device="cuda"), brute(queries, BANK, k))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_fewer_rows_than_k(n):
    scores, ids = exact_topk(BANK[:2], BANK[:n], 10)
    assert scores.shape == ids.shape == (2, n)
    same((scores, ids), brute(BANK[:2], BANK[:n], 10))
    assert exact_topk(BANK[:2], BANK[:n], 10**9)[1].shape == (2, n)


def test_no_queries():
    assert exact_topk(BANK[:0], BANK, 10)[1].shape == (0, 10)


def changed(value: float) -> np.ndarray:
    x = BANK[:50].copy()
    x[31, 5] = value
    return x


@pytest.mark.parametrize(
    ("queries", "bank", "k", "says"),
    [
        (BANK[:2], BANK, 0, "k must be"),
        (BANK[:2], BANK, True, "k must be"),
        (BANK[:2], BANK, 2.0, "k must be"),
        (BANK[:2, :9], BANK, 3, "width 9, but the bank's rows have width 24"),
        (BANK[0], BANK, 3, "shape"),
        (BANK[:2].astype(np.int64), BANK, 3, "int64"),
        (BANK[:2].astype(str), BANK, 3, "floats"),
        (BANK[:2].tolist(), BANK, 3, "list"),
        (BANK[:2], BANK.tolist(), 3, "list"),
        (changed(np.nan), BANK, 3, "queries: row 31"),
        (changed(np.inf), BANK, 3, "queries: row 31"),
        (changed(1e30), BANK, 3, "queries: row 31"),
        (BANK[:2], changed(np.nan), 3, "bank: row 31"),
        (BANK[:2], changed(-np.inf), 3, "bank: row 31"),
        (BANK[:2], torch.from_numpy(changed(np.nan)), 3, "bank: row 31"),
    ],
)
def test_refuses(queries, bank, k, says):
    with pytest.raises(BadInput, match=says):
        exact_topk(queries, bank, k)
    with pytest.raises(ValueError):  # for callers that know nothing of ours
        exact_topk(queries, bank, k)


def test_a_bank_overwritten_with_nan_is_noticed():
    bank = BANK.copy()
    exact_topk(BANK[:1], bank, 3)
    bank[:] = np.nan
    with pytest.raises(BadInput, match="bank: row 0"):
        exact_topk(BANK[:1], bank, 3)


def test_faiss_is_left_as_it_was():
    before = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    exact_topk(rows(64, seed=1), BANK, 5)
    exact_topk(rows(1, seed=1), BANK, 5)
    assert faiss.omp_get_max_threads() == 2
    faiss.omp_set_num_threads(before[1])
    assert faiss.cvar.distance_compute_blas_threshold == before[0]


def test_threads_may_search_at_once():
    queries, expected, wrong = rows(6, seed=1), brute(rows(6, seed=1), BANK, 5), []

    def work(batch: int) -> None:
        for _ in range(10):
            if (exact_topk(queries[:batch], BANK, 5)[1] != expected[1][:batch]).any():
                wrong.append(batch)

    threads = [threading.Thread(target=work, args=(b,)) for b in (1, 6, 1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
