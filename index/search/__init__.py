"""Search on arrays first (`exact_topk`), on published collections second (`index.search.opened`)."""

from index.search.exact import exact_topk

__all__ = ["exact_topk"]
