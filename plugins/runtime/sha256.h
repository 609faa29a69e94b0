//! SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace edgeattn
{

class Sha256
{
public:
    void update(unsigned char const* data, size_t size);

    //! The digest as 64 lower-case hexadecimal digits; nothing may be added afterwards.
    std::string hex();

private:
    void block(unsigned char const* data);

    std::array<uint32_t, 8> mState{
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> mRest{};
    uint64_t mSize = 0;
};

} // namespace edgeattn
