//! fp16 and bf16, which the oldest compiler has no types for.
#pragma once

#include <cstdint>
#include <cstring>

namespace edgeattn
{

inline float float_of_bits(uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of_float(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

//! bf16 is the upper half of an fp32.
inline float from_bfloat16(uint16_t bits)
{
    return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

//! The nearest bf16, ties to even; for finite numbers.
inline uint16_t to_bfloat16(float value)
{
    uint32_t const bits = bits_of_float(value);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t bits)
{
    uint32_t const sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    uint32_t const exponent = bits >> 10 & 0x1F, fraction = bits & 0x3FF;
    if (exponent == 0) // zero and what is subnormal: a multiple of 2**-24, exact in fp32
    {
        float const size = static_cast<float>(fraction) * 0x1p-24F;
        return float_of_bits(bits_of_float(size) | sign);
    }
    uint32_t const wide = exponent == 0x1F ? 0xFF : exponent + 112;
    return float_of_bits(sign | wide << 23 | fraction << 13);
}

//! The nearest fp16, ties to even; infinity beyond its range, and for finite numbers only.
inline uint16_t to_float16(float value)
{
    uint32_t const bits = bits_of_float(value), size = bits & 0x7FFFFFFF;
    uint16_t const sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (size >= 0x477FF000) // from 65520 on
    {
        return static_cast<uint16_t>(sign | 0x7C00);
    }
    if (size < 0x38800000) // below 2**-14: fp32 adds it to 0.5, whose last place is 2**-24, and so rounds it
    {
        return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(size) + 0.5F) - 0x3F000000));
    }
    return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13);
}

} // namespace edgeattn
