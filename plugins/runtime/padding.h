//! Rows of tokens with padding on the right.
#pragma once

#include "edgeattn/error.hpp"

#include <cstdint>
#include <vector>

namespace edgeattn
{

//! Rows of tokens that were checked.
struct Rows
{
    int64_t rows;
    int64_t length;
    std::vector<int64_t> tokens; //!< `[rows, length]`, 0 at padding: there may be a marker such as -100
    std::vector<int64_t> mask;   //!< `[rows, length]`, 1 at tokens and 0 at padding

    //! Tokens of a row.
    int64_t tokens_of(int64_t row) const
    {
        int64_t count = 0;
        for (int64_t i = 0; i < length; ++i)
        {
            count += mask[static_cast<size_t>(row * length + i)];
        }
        return count;
    }
};

//! \param mask null when there is no padding.
//! \param limit token ids lie below it.
//! \throws Error kRuntimeInput: no tokens, an id beyond the vocabulary, or a mask that is not ones, then zeros.
Rows checked_rows(int64_t const* tokens, int64_t rows, int64_t length, int64_t const* mask, int64_t limit);

//! \throws Error kRuntimeInput: one is not below the limit.
void require_below(char const* what, std::vector<int64_t> const& values, int64_t limit);

} // namespace edgeattn
