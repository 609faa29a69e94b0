//! Every fp64 operation here is one IEEE-754 operation: this file is compiled with -ffp-contract=off.
#include "edgeattn/sampling.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace edgeattn
{
namespace
{

// ln 2 in two parts; the high one ends in 21 zero bits, so that k * kLn2High is exact for the |k| <= 1022 that
// occur (fdlibm's e_exp.c).
constexpr double kLn2High = 0x1.62e42feep-1;
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kExpLowest = -708.0; // exp of less is flushed to 0, short of the subnormal numbers
constexpr size_t kDegree = 13;        // below 2e-17 of the result for |r| <= ln(2) / 2

//! 1 / n!, each correctly rounded: up to 13! the factorial is exact in fp64.
constexpr std::array<double, kDegree + 1> coefficients()
{
    std::array<double, kDegree + 1> quotients{1.0};
    double factorial = 1;
    for (size_t n = 1; n <= kDegree; ++n)
    {
        factorial *= static_cast<double>(n);
        quotients[n] = 1 / factorial;
    }
    return quotients;
}

constexpr auto kCoefficients = coefficients();

//! As Python writes it: with the fewest digits that are enough.
std::string text_of(double value)
{
    char text[64];
    std::string found(text, std::to_chars(text, text + sizeof text, value).ptr);
    return found.find_first_not_of("-0123456789") == std::string::npos ? found + ".0" : found;
}

std::string text_of(int64_t value)
{
    return std::to_string(value);
}

template <typename Number>
void require(char const* name, char const* allowed, Number value, bool fits)
{
    if (!fits)
    {
        throw Error(ErrorCode::kUsage, std::string("a ") + name + " " + allowed, "it is " + text_of(value),
            "correct the value");
    }
}

//! The largest logit, of equal ones the smallest id.
//! \throws Error kRuntimeInput: no token can be chosen from these.
size_t largest(float const* logits, size_t vocabulary)
{
    float const infinity = std::numeric_limits<float>::infinity();
    auto const bad = std::find_if(logits, logits + vocabulary, [=](float logit) { return !(logit < infinity); });
    if (bad != logits + vocabulary)
    {
        throw Error(ErrorCode::kRuntimeInput, "finite logits",
            "that of token " + std::to_string(bad - logits) + " is " + (std::isnan(*bad) ? "NaN" : "+inf"),
            "verify the bundle with edgeattn verify");
    }
    auto const best = std::max_element(logits, logits + vocabulary);
    if (best == logits + vocabulary || *best == -infinity)
    {
        throw Error(ErrorCode::kRuntimeInput, "logits of which one is finite", "none is",
            "pass the logits of one position, one per token of the vocabulary");
    }
    return static_cast<size_t>(best - logits);
}

struct Candidate
{
    uint32_t key; // the larger the logit, the smaller
    uint32_t id;
};

Candidate candidate(float logit, size_t id)
{
    constexpr uint32_t kSign = 0x80000000U;
    float const unsigned_zero = logit + 0.0F; // -0.0 becomes 0.0: they are equal, their bits are not
    uint32_t bits;
    std::memcpy(&bits, &unsigned_zero, sizeof bits);
    return {(bits & kSign) != 0 ? bits : bits ^ ~kSign, static_cast<uint32_t>(id)};
}

//! Radix sort, stable: a vocabulary takes a tenth of the time of comparisons, whose branches are not predicted.
void sort_by_key(std::vector<Candidate>& candidates)
{
    constexpr int kDigitBits = 11;
    constexpr uint32_t kDigits = 1U << kDigitBits;
    std::vector<Candidate> sorted(candidates.size());
    for (int shift = 0; shift < 32; shift += kDigitBits)
    {
        auto const digit = [=](Candidate const& one) { return one.key >> shift & (kDigits - 1); };
        std::array<size_t, kDigits + 1> place{};
        for (auto const& one : candidates)
        {
            ++place[digit(one) + 1];
        }
        std::partial_sum(place.begin(), place.end(), place.begin());
        for (auto const& one : candidates)
        {
            sorted[place[digit(one)]++] = one;
        }
        candidates.swap(sorted);
    }
}

//! The first `count` ids by (-logit, id).
std::vector<Candidate> ordered(float const* logits, size_t vocabulary, size_t count)
{
    std::vector<Candidate> found(vocabulary);
    for (size_t id = 0; id < vocabulary; ++id)
    {
        found[id] = candidate(logits[id], id);
    }
    if (count < vocabulary)
    {
        std::vector<uint32_t> keys(vocabulary);
        std::transform(found.begin(), found.end(), keys.begin(), [](Candidate const& one) { return one.key; });
        auto const nth = keys.begin() + static_cast<std::ptrdiff_t>(count - 1);
        std::nth_element(keys.begin(), nth, keys.end());
        auto const is_later = [last = *nth](Candidate const& one) { return one.key > last; };
        found.erase(std::remove_if(found.begin(), found.end(), is_later), found.end());
    }
    sort_by_key(found);
    found.resize(count);
    return found;
}

} // namespace

void Sampling::check() const
{
    require("temperature", "0 or more", temperature, temperature >= 0 && std::isfinite(temperature));
    require("top-k", "0 (all) or more", top_k, top_k >= 0);
    require("top-p", "above 0 and at most 1", top_p, top_p > 0 && top_p <= 1);
}

int64_t Sampling::pick(float const* logits, size_t vocabulary, uint64_t index) const
{
    check();
    size_t const best = largest(logits, vocabulary);
    if (temperature == 0)
    {
        return static_cast<int64_t>(best);
    }
    bool const all = top_k == 0 || static_cast<uint64_t>(top_k) >= vocabulary;
    auto const candidates = ordered(logits, vocabulary, all ? vocabulary : static_cast<size_t>(top_k));
    std::vector<double> cumulated;
    cumulated.reserve(candidates.size());
    double sum = 0;
    for (auto const& one : candidates)
    {
        sum += exp((static_cast<double>(logits[one.id]) - static_cast<double>(logits[best])) / temperature);
        cumulated.push_back(sum);
    }
    auto const target = std::lower_bound(cumulated.begin(), cumulated.end(), top_p * sum);
    auto const last = std::min(target, cumulated.end() - 1);
    double const draw = uniform(seed, index) * *last;
    auto const chosen = std::upper_bound(cumulated.begin(), last, draw); // rounding may leave none: the last
    return candidates[static_cast<size_t>(chosen - cumulated.begin())].id;
}

double exp(double x)
{
    if (x < kExpLowest)
    {
        return 0;
    }
    double const k = std::nearbyint(x * kLog2E); // ties to even
    double const r = (x - k * kLn2High) - k * kLn2Low;
    double y = kCoefficients.back();
    for (size_t n = kDegree; n-- > 0;)
    {
        y = y * r + kCoefficients[n];
    }
    return std::ldexp(y, static_cast<int>(k));
}

double uniform(uint64_t seed, uint64_t index)
{
    auto const low = [](uint64_t x) { return static_cast<uint32_t>(x); };
    auto const words = philox({low(index), low(index >> 32), 0, 0}, {low(seed), low(seed >> 32)});
    return ((words[0] >> 5) * 67108864.0 + (words[1] >> 6)) / 9007199254740992.0;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k)
{
    for (int round = 0; round < 10; ++round)
    {
        uint64_t const p0 = uint64_t{c[0]} * 0xD2511F53U;
        uint64_t const p1 = uint64_t{c[2]} * 0xCD9E8D57U;
        c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
            static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
        k = {k[0] + 0x9E3779B9U, k[1] + 0xBB67AE85U};
    }
    return c;
}

} // namespace edgeattn
