"""What decoding with few heads can buy: arithmetic on the bytes that a token moves.

Decoding reads all weights once for a batch, and each row's own keys and values. Only the latter
become fewer: with a share a of all bytes, and a share d of the heads active, at most

    speed-up <= 1 / (1 - a (1 - d))

(bandwidth model of arXiv 2505.14884's setting; kernels, routers and launches are not counted.)
"""

from __future__ import annotations

import math

# Less than this is not worth a loss: measuring it is hard, too.
WORTH_IT = 1.05


def cache_share(
    weight_bytes: float, cache_bytes_per_token: float, context: int, batch: int
) -> float:
    """Share a of the cache in what a decode step reads.

    Args:
        weight_bytes: that every step reads: all but the rows of an embedding that is no head.
        cache_bytes_per_token: keys and values of all layers.
        context: tokens of each row.
        batch: rows.
    """
    cache = cache_bytes_per_token * context * batch
    return cache / (cache + weight_bytes)


def decode_speedup(share: float, density: float) -> float:
    """Most that decoding gains.

    Args:
        share: of the cache, from `cache_share`.
        density: share of the heads, or KV groups, that are active; on the mean over all layers.
    """
    return 1 / (1 - share * (1 - density))


def least_context(
    weight_bytes: float, cache_bytes_per_token: float, batch: int, density: float
) -> float:
    """Tokens of each row from which decoding gains `WORTH_IT`; infinite where it never does.

    Arguments as for `cache_share` and `decode_speedup`, which this inverts.
    """
    if density >= 1 / WORTH_IT:
        return math.inf
    share = (1 - 1 / WORTH_IT) / (1 - density)
    return share / (1 - share) * weight_bytes / (cache_bytes_per_token * batch)
