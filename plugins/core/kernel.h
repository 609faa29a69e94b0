//! What generated/<op>_kernels.h needs besides the language.
#pragma once

#include <array>
#include <cstdint>

namespace edgeattn
{

//! Blocks along x, y and z.
struct Grid
{
    int64_t x;
    int64_t y;
    int64_t z;
};

//! a / b, rounded up.
constexpr int64_t cdiv(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

} // namespace edgeattn
