//! What plugins of linear attention have in common: edgeattn/ops/kernel_widths.py in C++, and their workspace.
#pragma once

#include "edgeattn/error.hpp"
#include "core/kernel.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <string>

namespace edgeattn::linear_attention
{

//! To one of these Dk and Dv are padded in the kernels.
constexpr int32_t kBLOCKS[] = {16, 32, 64, 128};
constexpr int32_t kMAX_WIDTH = 128;

//! The kernels load vectors, rows of which must not end within one.
constexpr int32_t kALIGNMENT = 8;

//! Rows times the larger head dimension: kernels count within a head in int32.
constexpr int32_t kMOST_NUMBERS = 1 << 29;

//! A constant in which the kernels of a launch must agree: rows between states that are written down.
constexpr char const* kSPAN = "SPAN";

inline int32_t blockOf(int32_t width)
{
    return *std::lower_bound(std::begin(kBLOCKS), std::end(kBLOCKS) - 1, width);
}

template <typename Dims>
int32_t blockOf(Dims const& dims)
{
    return blockOf(std::max(dims.Dk, dims.Dv));
}

//! \param came with its verb.
inline Error refused(char const* op, std::string const& expected, std::string const& came)
{
    return {expected, came, std::string("see ") + op + " in edgeattn.ops"};
}

//! \throws Error no kernel is made for such head dimensions, or for so many rows.
inline void requireSizes(char const* op, std::initializer_list<int32_t> widths, int32_t rows)
{
    for (auto const width : widths)
    {
        if (width < 1 || width > kMAX_WIDTH || width % kALIGNMENT != 0)
        {
            throw refused(op,
                "head dimensions that are multiples of " + std::to_string(kALIGNMENT) + " up to "
                    + std::to_string(kMAX_WIDTH),
                std::to_string(width) + " came");
        }
    }
    auto const widest = std::max(widths);
    if (rows > kMOST_NUMBERS / widest)
    {
        throw refused(op,
            "at most " + std::to_string(kMOST_NUMBERS / widest) + " rows of " + std::to_string(widest) + " numbers",
            std::to_string(rows) + " came");
    }
}

template <typename Dims>
void requireSizes(char const* op, Dims const& dims)
{
    requireSizes(op, {dims.Dk, dims.Dv}, dims.T);
}

//! \throws Error two loaded kernels of an operator differ in a constant.
template <typename First, typename Second>
void requireSame(char const* op, First const& first, Second const& second, char const* constant)
{
    if (first.constant(constant) != second.constant(constant))
    {
        throw Error(std::string("kernels of ") + op + " with one " + constant, "they have two",
            "correct kernels/variants.toml and build the library again");
    }
}

//! Deals out a workspace, in bytes from its start.
class Workspace
{
public:
    //! \param numbers in fp32.
    size_t take(int64_t numbers)
    {
        constexpr int64_t kPLACE = 256;
        size_t const start = mSize;
        mSize += static_cast<size_t>(cdiv(numbers * int64_t{sizeof(float)}, kPLACE) * kPLACE);
        return start;
    }

    size_t size() const
    {
        return mSize;
    }

private:
    size_t mSize{0};
};

} // namespace edgeattn::linear_attention
