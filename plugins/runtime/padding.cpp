#include "padding.h"

#include <string>

namespace edgeattn
{
namespace
{

constexpr int64_t kMost = int64_t{1} << 40; // numbers of an input: no memory holds more

std::vector<int64_t> checked_mask(int64_t const* mask, int64_t rows, int64_t length)
{
    std::vector<int64_t> checked(static_cast<size_t>(rows * length), 1);
    for (size_t i = 0; mask && i < checked.size(); ++i)
    {
        bool const first = i % static_cast<size_t>(length) == 0;
        bool const fits = mask[i] == 0 || (mask[i] == 1 && (first || mask[i - 1] == 1));
        if (!fits)
        {
            throw Error(ErrorCode::kRuntimeInput, "an attention_mask of ones, then zeros in each row",
                "it holds other numbers or padding before a token", "pad on the right");
        }
        checked[i] = mask[i];
    }
    return checked;
}

} // namespace

void require_below(char const* what, std::vector<int64_t> const& values, int64_t limit)
{
    for (int64_t value : values)
    {
        if (value < 0 || value >= limit)
        {
            throw Error(ErrorCode::kRuntimeInput, std::string(what) + " from 0 to " + std::to_string(limit - 1),
                "there is " + std::to_string(value), "use the bundle's own tokenizer");
        }
    }
}

Rows checked_rows(int64_t const* tokens, int64_t rows, int64_t length, int64_t const* mask, int64_t limit)
{
    if (!tokens || rows < 1 || length < 1 || rows > kMost / length)
    {
        throw Error(ErrorCode::kRuntimeInput, "input_ids of shape [batch, length], both at least 1",
            tokens ? "the shape is [" + std::to_string(rows) + ", " + std::to_string(length) + "]" : "there are none",
            "put the token ids of each text into one row");
    }
    Rows checked{rows, length, {}, checked_mask(mask, rows, length)};
    checked.tokens.resize(checked.mask.size());
    for (size_t i = 0; i < checked.mask.size(); ++i)
    {
        checked.tokens[i] = checked.mask[i] ? tokens[i] : 0;
    }
    require_below("token ids", checked.tokens, limit);
    return checked;
}

} // namespace edgeattn
