//! Sampling: the algorithm that edgeattn/runtime/sampling.py writes down, which picks the same tokens.
#pragma once

#include "edgeattn/error.hpp"

#include <array>
#include <cstddef>
#include <cstdint>

namespace edgeattn
{

//! How the next token is chosen.
struct EDGEATTN_API Sampling
{
    double temperature = 0.0; //!< 0 is greedy; below 1 favours likely tokens
    int64_t top_k = 0;        //!< most candidates; 0 is all
    double top_p = 1.0;       //!< candidates are the likeliest that together reach this probability; 1 is all
    uint64_t seed = 0;        //!< the same seed gives the same text

    //! \throws Error kUsage: a number is outside its range.
    void check() const;

    //! Chooses a token.
    //! \param logits `[vocabulary]`.
    //! \param index of the new token, counted from 0.
    //! \return its id.
    //! \throws Error kUsage: a number is outside its range; kRuntimeInput: there are no logits, one is NaN or
    //! +inf, or all are -inf.
    int64_t pick(float const* logits, size_t vocabulary, uint64_t index) const;
};

//! e**x for x <= 0 from plain fp64 additions and multiplications, to about 1 ulp. Below -708 it is 0.
EDGEATTN_API double exp(double x);

//! The number in [0, 1) with 53 random bits that belongs to a seed and an index.
EDGEATTN_API double uniform(uint64_t seed, uint64_t index);

//! Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011).
EDGEATTN_API std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

} // namespace edgeattn
