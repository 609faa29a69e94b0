#include "sha256.h"

#include <algorithm>

namespace edgeattn
{
namespace
{

constexpr size_t kBlock = 64;

constexpr std::array<uint32_t, 64> kRound{0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7,
    0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c,
    0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotated(uint32_t x, int n)
{
    return (x >> n) | (x << (32 - n));
}

} // namespace

void Sha256::update(unsigned char const* data, size_t size)
{
    while (size > 0)
    {
        size_t const used = mSize % kBlock;
        size_t const step = std::min(size, kBlock - used);
        if (step == kBlock)
        {
            block(data);
        }
        else
        {
            std::copy_n(data, step, mRest.begin() + static_cast<std::ptrdiff_t>(used));
            if (used + step == kBlock)
            {
                block(mRest.data());
            }
        }
        mSize += step;
        data += step;
        size -= step;
    }
}

std::string Sha256::hex()
{
    uint64_t const bits = mSize * 8;
    std::array<unsigned char, kBlock + 8> tail{0x80};
    size_t const zeros = (2 * kBlock - 9 - mSize % kBlock) % kBlock;
    for (size_t i = 0; i < 8; ++i)
    {
        tail[1 + zeros + i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    }
    update(tail.data(), 1 + zeros + 8);
    std::string text;
    for (uint32_t word : mState)
    {
        for (int shift = 28; shift >= 0; shift -= 4)
        {
            text += "0123456789abcdef"[(word >> shift) & 15];
        }
    }
    return text;
}

void Sha256::block(unsigned char const* data)
{
    std::array<uint32_t, 64> w{};
    for (size_t i = 0; i < 16; ++i)
    {
        unsigned char const* const b = data + 4 * i;
        w[i] = uint32_t{b[0]} << 24 | uint32_t{b[1]} << 16 | uint32_t{b[2]} << 8 | uint32_t{b[3]};
    }
    for (size_t i = 16; i < 64; ++i)
    {
        uint32_t const s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ (w[i - 15] >> 3);
        uint32_t const s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = mState;
    for (size_t i = 0; i < 64; ++i)
    {
        uint32_t const s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
        uint32_t const t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
        uint32_t const s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
        uint32_t const t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    std::array<uint32_t, 8> const added{a, b, c, d, e, f, g, h};
    std::transform(mState.begin(), mState.end(), added.begin(), mState.begin(), [](uint32_t x, uint32_t y) { return x + y; });
}

} // namespace edgeattn
