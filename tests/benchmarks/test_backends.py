"""The short forms of `benchmarks.parity` and `benchmarks.resharding`: every backend once, some of the cells."""

from __future__ import annotations

from benchmarks.parity import compare
from benchmarks.resharding import BAR, matrix
from pretrain.backend_names import BACKENDS

ENGINES = (
    "PyTorch on 1", "DistributedDataParallel on 2", "FSDP2 on 2", "DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2",
    "DeepSpeed ZeRO-3",
)  # fmt: skip


def test_every_backend_has_the_curve_of_one_process():
    rows = list(compare(2, ["clip"], "fp32", BACKENDS, 4))
    assert all(row["holds"] for row in rows), rows
    assert [row["engine"].startswith(engine) for row, engine in zip(rows, ENGINES, strict=True)] == [True] * 6


def test_what_one_backend_saved_another_goes_on_with():
    *_, rows = matrix("clip", [2, 3], ["fsdp2", "zero2"])
    names = ["fsdp2_2", "zero2_2", "fsdp2_3", "zero2_3"]
    assert [list(row) for row in rows] == [["writer", *names]] * 4
    assert max(row[reader] for row in rows for reader in names) <= BAR, rows
