#include "history.h"

#include <algorithm>

namespace edgeattn
{

std::map<std::string, Feed> History::feeds(Rows const& rows, std::optional<int64_t> slots) const
{
    int64_t const places = slots.value_or(length() + rows.length);
    Shape const given{rows.rows, rows.length};
    return {
        {"input_ids", {given, rows.tokens}},
        {"position_ids", {given, positions(rows)}},
        {"attention_mask", {{rows.rows, places}, mask(rows, places)}},
        {"write_indices", {{rows.rows}, std::vector<int64_t>(static_cast<size_t>(rows.rows), length())}},
    };
}

void History::add(Rows const& rows)
{
    for (int64_t row = 0; row < rows.rows; ++row)
    {
        auto const begin = rows.mask.begin() + row * rows.length;
        std::vector<int64_t>& past = mMasks[static_cast<size_t>(row)];
        past.insert(past.end(), begin, begin + rows.length);
        mNext[static_cast<size_t>(row)] += rows.tokens_of(row);
    }
}

std::vector<int64_t> History::positions(Rows const& rows) const
{
    std::vector<int64_t> positions;
    for (int64_t row = 0; row < rows.rows; ++row)
    {
        int64_t next = mNext[static_cast<size_t>(row)];
        for (int64_t i = 0; i < rows.length; ++i)
        {
            next += rows.mask[static_cast<size_t>(row * rows.length + i)];
            positions.push_back(std::max<int64_t>(next - 1, 0)); // padding stays where the row ended
        }
    }
    return positions;
}

std::vector<int64_t> History::mask(Rows const& rows, int64_t slots) const
{
    std::vector<int64_t> mask(static_cast<size_t>(rows.rows * slots), 0);
    for (int64_t row = 0; row < rows.rows; ++row)
    {
        std::vector<int64_t> const& past = mMasks[static_cast<size_t>(row)];
        auto const middle = std::copy(past.begin(), past.end(), mask.begin() + row * slots);
        std::copy_n(rows.mask.begin() + row * rows.length, rows.length, middle);
    }
    return mask;
}

} // namespace edgeattn
