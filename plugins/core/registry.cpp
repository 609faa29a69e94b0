#include "core/registry.h"
#include "edgeattn/error.hpp"

#include <algorithm>
#include <cstring>
#include <set>
#include <string>

namespace edgeattn
{
namespace
{

Constant const* find(View<Constant> constants, char const* name)
{
    for (auto const& constant : constants)
    {
        if (std::strcmp(constant.name, name) == 0)
        {
            return &constant;
        }
    }
    return nullptr;
}

bool fits(Cubin const& cubin, Wanted const& wanted)
{
    if (cubin.dtype != wanted.dtype)
    {
        return false;
    }
    for (auto const& constant : wanted.constants)
    {
        auto const* const found = find(cubin.constants, constant.name);
        if (found == nullptr || found->value != constant.value)
        {
            return false;
        }
    }
    return true;
}

//! Desktop and server parts run the code of lower ones of their major version. Jetson's 87 is no such part, and what
//! is compiled for 90 and above uses features of that one part (its "a" targets).
bool runs(int32_t device, int32_t compiled)
{
    auto const isOrdinary = [](int32_t sm) { return sm == 75 || sm == 80 || sm == 86 || sm == 89; };
    return device == compiled
        || (isOrdinary(device) && isOrdinary(compiled) && device / 10 == compiled / 10 && device > compiled);
}

View<Cubin> cubinsOf(char const* kernel)
{
    for (auto const& entry : kKERNELS)
    {
        if (std::strcmp(entry.name, kernel) == 0)
        {
            return entry.cubins;
        }
    }
    return {};
}

template <typename Predicate>
bool anyCubin(OpInfo const& op, Predicate&& predicate)
{
    for (auto const& kernel : kKERNELS)
    {
        if (std::strncmp(kernel.name, op.kernels, std::strlen(op.kernels)) != 0)
        {
            continue;
        }
        for (auto const& cubin : kernel.cubins)
        {
            if (predicate(cubin))
            {
                return true;
            }
        }
    }
    return false;
}

template <typename Constants>
std::string textOf(Dtype dtype, Constants const& constants)
{
    std::string text = nameOf(dtype);
    for (auto const& constant : constants)
    {
        text += std::string(" ") + constant.name + "=" + std::to_string(constant.value);
    }
    return text;
}

std::string textOf(std::set<std::string> const& items)
{
    std::string text;
    for (auto const& item : items)
    {
        text += (text.empty() ? "" : ", ") + item;
    }
    return text.empty() ? "nothing" : text;
}

//! What to say where no cubin fits: the devices of the variant or, where it has none, the variants of the kernel.
Error missing(Wanted const& wanted, std::string const& device)
{
    std::set<std::string> devices;
    std::set<std::string> variants;
    for (auto const& cubin : cubinsOf(wanted.kernel))
    {
        variants.insert(textOf(cubin.dtype, cubin.constants));
        if (fits(cubin, wanted))
        {
            devices.insert("SM " + std::to_string(cubin.sm));
        }
    }
    auto const expected = std::string("kernel ") + wanted.kernel + " for " + textOf(wanted.dtype, wanted.constants)
        + device + " in the plugin library";
    auto const came
        = devices.empty() ? "it holds that kernel for " + textOf(variants) : "it holds this one for " + textOf(devices);
    return {expected, came, "build the library with what is missing"};
}

} // namespace

char const* nameOf(Dtype dtype) noexcept
{
    switch (dtype)
    {
    case Dtype::kFP32: return "fp32";
    case Dtype::kFP16: return "fp16";
    case Dtype::kBF16: return "bf16";
    case Dtype::kINT32: return "int32";
    case Dtype::kINT8: return "int8";
    case Dtype::kBOOL: return "bool";
    }
    return "an unknown dtype";
}

Cubin const& findCubin(Wanted const& wanted, int32_t sm)
{
    Cubin const* best = nullptr;
    for (auto const& cubin : cubinsOf(wanted.kernel))
    {
        if (runs(sm, cubin.sm) && (best == nullptr || cubin.sm > best->sm) && fits(cubin, wanted))
        {
            best = &cubin;
        }
    }
    if (best == nullptr)
    {
        throw missing(wanted, " on SM " + std::to_string(sm));
    }
    return *best;
}

void requireVariant(Wanted const& wanted)
{
    auto const cubins = cubinsOf(wanted.kernel);
    if (std::none_of(cubins.begin(), cubins.end(), [&](Cubin const& cubin) { return fits(cubin, wanted); }))
    {
        throw missing(wanted, "");
    }
}

int64_t smallestConstant(Wanted const& wanted, char const* name)
{
    requireVariant(wanted);
    int64_t smallest = INT64_MAX;
    for (auto const& cubin : cubinsOf(wanted.kernel))
    {
        smallest = fits(cubin, wanted) ? std::min(smallest, constantOf(cubin, name)) : smallest;
    }
    return smallest;
}

bool hasKernels(OpInfo const& op) noexcept
{
    return anyCubin(op, [](Cubin const&) { return true; });
}

bool hasKernels(OpInfo const& op, Dtype dtype) noexcept
{
    return anyCubin(op, [&](Cubin const& cubin) { return cubin.dtype == dtype; });
}

int64_t constantOf(Cubin const& cubin, char const* name)
{
    auto const* const found = find(cubin.constants, name);
    if (found == nullptr)
    {
        throw Error(std::string("kernel ") + cubin.entry + " with a constant " + name, "it has none",
            "build the library again, with kernels and plugins of one version");
    }
    return found->value;
}

} // namespace edgeattn
