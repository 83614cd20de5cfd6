"""The tables beside the vectors, as parquet: metadata (a row an image), what was skipped, and the kept
originals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

META = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # name of the tar
        ("member", pa.int64()),  # sample's place in the tar
        ("extension", pa.string()),  # of the image
        ("offset", pa.int64()),  # of the image's bytes in the tar
        ("size", pa.int64()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.int64()),  # -1: none
        ("json", pa.string()),  # the sample's .json as it stands there; "" when it has none
    ]
)
SKIPPED = pa.schema([("key", pa.string()), ("shard", pa.string()), ("member", pa.int64()), ("reason", pa.string())])
CANARIES = pa.schema([("row", pa.int64()), ("image", pa.binary())])

ROW_GROUP = 4096  # a parquet row group is read whole: small ones make a single row cheap


def write_table(path: Path, rows: Sequence[dict[str, Any]] | pa.Table, schema: pa.Schema) -> None:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd")


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(path, columns=columns, use_threads=False)
