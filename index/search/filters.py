"""Which rows a filter leaves: conditions on metadata columns, all of which must hold.

`{"label": 3}` or `{"label": {"in": [3, 5]}, "key": {"gte": "b", "lt": "c"}}`. No expression language:
conditions are data, checked against the columns there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index.errors import BadInput

COLUMNS = {"key": str, "shard": str, "extension": str, "label": int, "member": int, "size": int}
LONGEST_LIST = 10_000
OPERATORS = {"eq": pc.equal, "lt": pc.less, "gte": pc.greater_equal}

Filter = Mapping[str, Any]


def check_filter(wanted: Filter) -> list[tuple[str, str, Any]]:
    """(column, operator, value) of each condition; `BadInput` for what cannot be asked."""
    if not isinstance(wanted, Mapping):
        raise BadInput(f"filter: expected {{column: value}}, got {type(wanted).__name__}")
    found = []
    for column, condition in wanted.items():
        if column not in COLUMNS:
            raise BadInput(f"filter: no column {column!r}; there are: {', '.join(COLUMNS)}")
        terms = condition if isinstance(condition, Mapping) else {"eq": condition}
        for operator, value in terms.items():
            _check_value(column, operator, value)
            found.append((column, operator, value))
    return found


def rows_matching(meta: pa.Table, wanted: Filter) -> np.ndarray:
    """Rows (M,) int64, ascending, of one segment's metadata that meet every condition."""
    mask = np.ones(len(meta), bool)
    for column, operator, value in check_filter(wanted):
        values = meta[column]
        if operator == "in":
            hits = pc.is_in(values, pa.array(value, values.type))
        else:
            hits = OPERATORS[operator](values, pa.scalar(value, values.type))
        mask &= hits.to_numpy(zero_copy_only=False).astype(bool)
    return np.flatnonzero(mask)


def _check_value(column: str, operator: str, value: Any) -> None:
    if operator not in (*OPERATORS, "in"):
        raise BadInput(f"filter: {column} has no operator {operator!r}; there are: eq, in, lt, gte")
    if operator == "in" and (not isinstance(value, list | tuple) or len(value) > LONGEST_LIST):
        raise BadInput(f"filter: {column} in … takes a list of at most {LONGEST_LIST} values")
    for one in value if operator == "in" else [value]:
        _check_one(column, one)


def _check_one(column: str, value: Any) -> None:
    kind = COLUMNS[column]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadInput(f"filter: {column} is compared with {kind.__name__}, not {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise BadInput(f"filter: {column} cannot be {value}: beyond 64 bits")
