//! See edgeattn/sampling.hpp. Every fp64 operation is one IEEE-754 operation: compile without
//! contraction (-ffp-contract=off), or results differ from those of Python.
#include "edgeattn/sampling.hpp"
#include "edgeattn/error.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

namespace edgeattn
{
namespace
{

// ln 2 in two parts; the high one ends in 21 zero bits, so that k * ln2High is exact for the
// |k| <= 1022 that occur (fdlibm's e_exp.c).
constexpr double ln2High = 0x1.62e42feep-1;
constexpr double ln2Low = 0x1.a39ef35793c76p-33;
constexpr double log2E = 0x1.71547652b82fep+0;
constexpr double lowestExponent = -708; // exp of less is flushed to 0, short of the subnormal numbers
constexpr int taylorDegree = 13; // below 2e-17 of the result for |r| <= ln(2) / 2

void require(bool fits, char const* name, char const* allowed, double value)
{
    if (!fits)
        throw Error(std::string("a ") + name + " " + allowed, "it is " + std::to_string(value), "correct the value",
            ErrorCode::usage);
}

void checkLogits(float const* logits, std::size_t vocabulary)
{
    if (logits == nullptr || vocabulary == 0)
        throw Error("logits of at least one token", "there are none", "pass those of the last position");
    bool anyFinite = false;
    for (std::size_t id = 0; id < vocabulary; ++id)
    {
        if (std::isnan(logits[id]) || logits[id] == HUGE_VALF)
            throw Error("finite logits", "that of token " + std::to_string(id) + " is " + std::to_string(logits[id]),
                "run the tokens again; if it stays, report this bundle");
        anyFinite = anyFinite || std::isfinite(logits[id]);
    }
    if (!anyFinite)
        throw Error("a finite logit", "all are -inf", "run the tokens again; if it stays, report this bundle");
}

//! The first `count` ids by (-logit, id).
std::vector<std::size_t> ordered(float const* logits, std::size_t vocabulary, std::size_t count)
{
    std::vector<std::size_t> ids(vocabulary);
    std::iota(ids.begin(), ids.end(), std::size_t{0});
    auto before
        = [logits](std::size_t a, std::size_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
    if (count < vocabulary)
    {
        std::nth_element(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(count), ids.end(), before);
        ids.resize(count);
    }
    std::sort(ids.begin(), ids.end(), before);
    return ids;
}

} // namespace

void Sampling::check() const
{
    require(temperature >= 0 && std::isfinite(temperature), "temperature", "0 or more", temperature);
    require(top_p > 0 && top_p <= 1, "top-p", "above 0 and at most 1", top_p);
}

std::int64_t Sampling::pick(float const* logits, std::size_t vocabulary, std::uint64_t index) const
{
    check();
    checkLogits(logits, vocabulary);
    if (temperature == 0)
        return std::max_element(logits, logits + vocabulary) - logits;
    auto const ids = ordered(logits, vocabulary, top_k == 0 ? vocabulary : std::min(top_k, vocabulary));
    double const first = static_cast<double>(logits[ids[0]]);
    std::vector<double> cumulated;
    cumulated.reserve(ids.size());
    double sum = 0;
    for (std::size_t id : ids)
        cumulated.push_back(sum += exponential((static_cast<double>(logits[id]) - first) / temperature));
    auto const kept = std::min(
        std::lower_bound(cumulated.begin(), cumulated.end(), top_p * cumulated.back()) + 1, cumulated.end());
    double const draw = uniform(seed, index) * kept[-1];
    auto const chosen = std::min(std::upper_bound(cumulated.begin(), kept, draw), kept - 1);
    return static_cast<std::int64_t>(ids[static_cast<std::size_t>(chosen - cumulated.begin())]);
}

double exponential(double x) noexcept
{
    if (x < lowestExponent)
        return 0;
    double const k = std::nearbyint(x * log2E); // ties to even
    double const r = (x - k * ln2High) - k * ln2Low;
    double factorials[taylorDegree + 1] = {1}; // exact in fp64
    for (int n = 1; n <= taylorDegree; ++n)
        factorials[n] = factorials[n - 1] * n;
    double y = 1 / factorials[taylorDegree];
    for (int n = taylorDegree - 1; n >= 0; --n)
    {
        y *= r;
        y += 1 / factorials[n];
    }
    return std::ldexp(y, static_cast<int>(k));
}

double uniform(std::uint64_t seed, std::uint64_t index) noexcept
{
    auto const low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
    auto const words = philox({low(index), low(index >> 32), 0, 0}, {low(seed), low(seed >> 32)});
    return ((words[0] >> 5) * 67108864.0 + (words[1] >> 6)) / 9007199254740992.0;
}

std::array<std::uint32_t, 4> philox(
    std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) noexcept
{
    auto const high = [](std::uint64_t product) { return static_cast<std::uint32_t>(product >> 32); };
    for (int round = 0; round < 10; ++round)
    {
        std::uint64_t const a = std::uint64_t{0xD2511F53} * counter[0], b = std::uint64_t{0xCD9E8D57} * counter[2];
        counter = {high(b) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b), high(a) ^ counter[3] ^ key[1],
            static_cast<std::uint32_t>(a)};
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    return counter;
}

} // namespace edgeattn
