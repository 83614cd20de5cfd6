"""Does this encoder still see what the segment's encoder saw? Asked of stored originals, not of a hash.

The fingerprint is a hash of what is meant to make the space; a changed image library or a wrong preprocessing
passes it. Encoding a few kept originals again catches those: their vectors must meet the stored ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index.errors import WrongEncoder
from index.store.segment import Segment
from index.store.unit import CANARY_ROWS
from pretrain.encoder import Encoder

LEAST_COSINE = 0.999  # float16 storage alone costs less than 1e-6


def check_fingerprint(encoder: Encoder, fingerprint: str, dim: int, name: str) -> None:
    """Raise `WrongEncoder` unless the encoder's space is that of the collection `name`."""
    if encoder.fingerprint != fingerprint or encoder.dim != dim:
        raise WrongEncoder(
            f"{name} was built with encoder {fingerprint[:12]} ({dim} wide), this one is "
            f"{encoder.fingerprint[:12]} ({encoder.dim} wide): give the encoder it was built with, "
            f"or build it anew with this one"
        )


def check_canaries(encoder: Encoder, segment: Segment, limit: int = CANARY_ROWS) -> float:
    """Encode up to `limit` kept originals of a segment again; the smallest cosine (1.0 when it keeps none).

    Raises `WrongEncoder` when one is 0.999 or less.
    """
    rows, originals = segment.canaries()
    if not len(rows):
        return 1.0
    stored = segment.emb[rows[:limit]].astype(np.float32)
    cosine = np.einsum("nd,nd->n", stored, encoder.encode_image(originals[:limit]))
    cosine = cosine / np.linalg.norm(stored, axis=1)
    least = float(cosine.min())
    if not least > LEAST_COSINE:
        key = segment.meta["key"][int(rows[cosine.argmin()])].as_py()
        raise WrongEncoder(
            f"{segment.folder}: image {key!r} encoded again has cosine {least:.4f} with its stored vector "
            f"(more than {LEAST_COSINE} is needed): "
            f"preprocessing differs from when it was embedded; embed it again"
        )
    return least


def check_encoder(encoder: Encoder, segments: Sequence[Segment]) -> float:
    """`check_canaries` over all segments with about 32 originals in all, at least one of each; the smallest
    cosine.
    """
    share = max(1, CANARY_ROWS // max(1, len(segments)))
    return min((check_canaries(encoder, segment, share) for segment in segments), default=1.0)
