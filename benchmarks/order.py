"""The sample order: opening 2e9 samples in the middle of a run, the cost of a step, and how well it shuffles.

No peer opens a set without its tables, so figures stand beside bars: 0.5 s for a cold open with one batch, 1 ms
a step for a rank's 512 rows, and 1.3 times the same-shard neighbours that uniform shuffling gives. A table of
all ids (numpy's permutation, what a map-style sampler holds) is timed at a fiftieth of the size for scale.
"""

from __future__ import annotations

import numpy as np

from benchmarks import common
from pretrain.order import SampleOrder

SHARDS, SHARD = 200_000, 10_000  # 2e9 samples
STEP, BATCH = 100_000, 4096  # sample 4.1e8
MIXING = [(1_000, 100, b) for b in (32, 100, 512, 997)]
MIXING += [(10_000_000, 10_000, b) for b in (512, 768, 1024, 4096, 16_384, 65_536)]


def cold(lengths: list[int]) -> None:
    SampleOrder([lengths], seed=0, global_batch=BATCH).batch(STEP)


def speed(rounds: int) -> list[dict]:
    lengths = [SHARD] * SHARDS
    warm = SampleOrder([lengths], seed=0, global_batch=BATCH)
    mixed = SampleOrder([lengths, [SHARD] * 900], seed=0, global_batch=BATCH, weights=[0.9, 0.1])
    fns = {
        "cold open + batch, 2e9 samples": lambda: cold(lengths),
        "step, 512 rows (rank 3 of 8)": lambda: warm.batch(STEP, 3, 8),
        "step, 512 rows, two sources": lambda: mixed.batch(STEP, 3, 8),
        "step, 4096 rows (one rank)": lambda: warm.batch(STEP),
        "numpy permutation of 4e7 ids": lambda: np.random.default_rng(0).permutation(SHARDS * SHARD // 50),
    }
    bars_ms = [500.0, 1.0, 1.0, 8.0, None]
    seconds = common.measure(fns, rounds)
    return [
        {
            "what": name,
            "cpu ms": s * 1e3,
            "bar ms": bar if bar else "-",
            "met": s * 1e3 <= bar if bar else "-",
        }
        for (name, s), bar in zip(seconds.items(), bars_ms)
    ]


def mates(samples: int, shard: int, batch: int, steps: int) -> float:
    """Mean rows of a batch that are of a row's own shard, over steps spread through three epochs."""
    order = SampleOrder([[shard] * (samples // shard)], seed=0, global_batch=batch)
    chosen = np.unique(np.linspace(0, 3 * samples // batch, steps).astype(int))
    counts = [np.bincount(order.batch(int(step)).ids // shard) for step in chosen]
    return float(np.mean([(c * (c - 1)).sum() / c.sum() for c in counts]))


def mixing() -> list[dict]:
    rows = []
    for samples, shard, batch in MIXING:
        ours = mates(samples, shard, batch, max(400_000 // batch, 50))
        uniform = (batch - 1) * (shard - 1) / (samples - 1)
        ratio = ours / uniform
        rows.append(
            {
                "samples": samples,
                "shards": samples // shard,
                "batch": batch,
                "mates": ours,
                "uniform": uniform,
            }
            | {"ratio": ratio, "bar": 1.3, "met": ratio <= 1.3}
        )
    return rows


def main() -> None:
    args = common.parser(__doc__ or "").parse_args()
    tables = {"speed": speed(args.rounds), "shuffle: rows of a batch that share a row's shard": mixing()}
    where = args.json
    for name, rows in tables.items():
        args.json = where and where.with_stem(f"{where.stem}_{name.split(':')[0]}")
        common.report(f"sample order: {name}", rows, args)


if __name__ == "__main__":
    main()
