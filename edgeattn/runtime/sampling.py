"""Sampling: one written algorithm, so that every language that follows it picks the same tokens.

Given fp32 logits of one position and the index of the new token, counted from 0:

1. Temperature 0 is greedy: the largest logit, of equal ones the smallest id. Otherwise:
2. Order the ids by (-logit, id); keep the first `top_k` (all when it is 0).
3. In fp64: w[i] = exp((logit[i] - logit[0]) / temperature), with the `exp` of this module;
   c[i] = c[i-1] + w[i], added one after the other.
4. Keep the shortest prefix with c[n-1] >= top_p * c[last].
5. (r0, r1, _, _) = Philox4x32-10 with counter (low word of the index, high word, 0, 0) and key
   (low word of the seed, high word); u = ((r0 >> 5) * 2**26 + (r1 >> 6)) / 2**53.
6. The token is the first of the kept with c[i] > u * c[n-1], the last when rounding leaves none.

Every fp64 operation is one IEEE-754 operation: a compiler must not fuse two (-ffp-contract=off).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WORD = 0xFFFFFFFF
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)

# ln 2 in two parts; the high one ends in 21 zero bits, so that k * _LN2_HIGH is exact for the
# |k| <= 1022 that occur (fdlibm's e_exp.c).
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
# Taylor to degree 13: below 2e-17 of the result for |r| <= ln(2) / 2. Each factorial is exact in
# fp64, so each quotient is the correctly rounded one in any language.
_EXP_COEFFICIENTS = tuple(1.0 / math.factorial(n) for n in range(14))
_EXP_LOWEST = -708.0  # exp of less is flushed to 0, short of the subnormal numbers


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy; below 1 favours likely tokens.
        top_k: most candidates; 0 is all.
        top_p: candidates are the likeliest that together reach this probability; 1 is all.
        seed: the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers outside their range.

        Raises:
            UsageError: naming the number and its range.
        """
        _check("temperature", "0 or more", self.temperature, 0 <= self.temperature < math.inf)
        _check("top-k", "0 (all) or more", self.top_k, self.top_k >= 0)
        _check("top-p", "above 0 and at most 1", self.top_p, 0 < self.top_p <= 1)
        _check("seed", "from 0 to 2**64 - 1", self.seed, 0 <= self.seed < 1 << 64)

    def pick(self, logits: NDArray[np.float32], index: int) -> int:
        """Chooses a token.

        Args:
            logits: `[V]` fp32, none NaN or +inf.
            index: of the new token, counted from 0.

        Returns:
            Its id.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        ids, values = _ordered(logits, self.top_k)
        with np.errstate(over="ignore"):  # a tiny temperature sends the rest to -inf, rightly
            scaled = (values - values[0]) / self.temperature
        # add.accumulate adds one after the other, where np.sum would add in pairs.
        cumulated = np.add.accumulate(exp(scaled))
        kept = int(np.searchsorted(cumulated, self.top_p * cumulated[-1])) + 1
        kept = min(kept, len(ids))
        draw = uniform(self.seed, index) * cumulated[kept - 1]
        chosen = int(np.searchsorted(cumulated[:kept], draw, side="right"))
        return int(ids[min(chosen, kept - 1)])


def _check(name: str, allowed: str, value: float, fits: bool) -> None:
    if not fits:
        raise UsageError(
            expected=f"a {name} {allowed}", came=f"it is {value}", todo="correct the value"
        )


def _ordered(
    logits: NDArray[np.float32], top_k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The first `top_k` ids by (-logit, id) and their logits in fp64, `[k]` each.

    Logit and id are packed into one integer per candidate, because sorting integers is several
    times faster than a stable sort of 150 thousand floats.
    """
    if 0 < top_k < len(logits):
        # The k-th largest and all that equal it; few are left to order.
        ids = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    else:
        ids = np.arange(len(logits))
    values = logits[ids] + np.float32(0)  # -0.0 becomes 0.0: they are equal, their bits are not
    bits = values.view(np.int32).astype(np.int64)
    ascending = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # -1 - x rather than -x keeps the range: in two's complement it is ~x.
    keys = (~ascending << 32) | ids
    keys.sort()
    ids = keys[: top_k or None] & _WORD
    return ids, logits[ids].astype(np.float64)


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e**x for x <= 0 from plain fp64 additions and multiplications, to about 1 ulp.

    k = round(x * log2(e)), ties to even; r = (x - k * ln2_high) - k * ln2_low; the Taylor
    polynomial of degree 13 in r by Horner's rule; times 2**k. Below -708 the result is 0.

    Args:
        x: `[N]`, none NaN.

    Returns:
        `[N]`.
    """
    inside = np.maximum(x, _EXP_LOWEST)
    k = np.rint(inside * _LOG2_E)
    r = (inside - k * _LN2_HIGH) - k * _LN2_LOW
    y = np.full_like(r, _EXP_COEFFICIENTS[-1])
    for coefficient in _EXP_COEFFICIENTS[-2::-1]:
        y *= r
        y += coefficient
    y = np.ldexp(y, k.astype(np.int32))
    y[x < _EXP_LOWEST] = 0.0
    return y


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) with 53 random bits that belongs to a seed and an index."""
    counter = (index & _WORD, index >> 32, 0, 0)
    high, low, _, _ = philox(counter, (seed & _WORD, seed >> 32))
    return ((high >> 5) * 67108864 + (low >> 6)) / 9007199254740992


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011).

    Args:
        counter: four 32-bit words.
        key: two 32-bit words.

    Returns:
        Four random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3
