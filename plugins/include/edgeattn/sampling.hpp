//! Sampling: the algorithm of edgeattn/runtime/sampling.py, which picks the same tokens.
//!
//! Given fp32 logits of one position and the index of the new token, counted from 0:
//!
//! 1. Temperature 0 is greedy: the largest logit, of equal ones the smallest id. Otherwise:
//! 2. Order the ids by (-logit, id); keep the first top_k (all when it is 0).
//! 3. In fp64: w[i] = exp((logit[i] - logit[0]) / temperature), with the exp of this header;
//!    c[i] = c[i-1] + w[i], added one after the other.
//! 4. Keep the shortest prefix with c[n-1] >= top_p * c[last].
//! 5. (r0, r1, _, _) = Philox4x32-10 with counter (low word of the index, high word, 0, 0) and key
//!    (low word of the seed, high word); u = ((r0 >> 5) * 2^26 + (r1 >> 6)) / 2^53.
//! 6. The token is the first of the kept with c[i] > u * c[n-1], the last when rounding leaves none.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#if defined(__GNUC__)
#define EDGEATTN_API __attribute__((visibility("default")))
#else
#define EDGEATTN_API
#endif

namespace edgeattn
{

//! How the next token is chosen.
struct EDGEATTN_API Sampling
{
    double temperature = 0; //!< 0 is greedy; below 1 favours likely tokens
    std::size_t top_k = 0; //!< most candidates; 0 is all
    double top_p = 1; //!< candidates are the likeliest that together reach this probability; 1 is all
    std::uint64_t seed = 0; //!< the same seed gives the same text

    //! Refuses numbers outside their range.
    //! \throws Error naming the number and its range.
    void check() const;

    //! Chooses a token.
    //! \param logits `[vocabulary]` fp32.
    //! \param vocabulary at least 1.
    //! \param index of the new token, counted from 0.
    //! \returns its id.
    //! \throws Error as `check`, or for no logits, NaN, +inf, and -inf alone.
    std::int64_t pick(float const* logits, std::size_t vocabulary, std::uint64_t index) const;
};

//! e^x for x <= 0 from plain fp64 additions and multiplications, to about 1 ulp; 0 below -708.
EDGEATTN_API double exponential(double x) noexcept;

//! The number in [0, 1) with 53 random bits that belongs to a seed and an index.
EDGEATTN_API double uniform(std::uint64_t seed, std::uint64_t index) noexcept;

//! Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011).
EDGEATTN_API std::array<std::uint32_t, 4> philox(
    std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) noexcept;

} // namespace edgeattn
