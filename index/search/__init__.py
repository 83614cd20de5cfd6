"""Search on arrays first (`exact_topk`), on published collections second (`index.search.searcher`)."""

from index.search.exact import exact_topk

__all__ = ["exact_topk"]
