//! From a compiled kernel's name to its launch.
#pragma once

#include "core/driver.h"
#include "edgeattn/error.hpp"
#include "core/kernel.h"
#include "core/registry.h"

#include <cstddef>

namespace edgeattn
{

//! A kernel in the context that was current when it was loaded.
struct LoadedFunction
{
    CUfunction function{nullptr};
    Cubin const* cubin{nullptr};
};

//! Finds the cubin for the device of the current context and loads it, once per context; any thread may call.
//!
//! \throws Error no kernel fits, no context is current, or the driver refuses.
LoadedFunction loadFunction(Wanted const& wanted);

//! Puts one launch on a stream; it allocates nothing and waits for nothing. An empty grid is no launch.
//!
//! \param arguments addresses of the kernel's arguments, as cuLaunchKernel takes them.
//! \throws Error the grid is too large, or the driver refuses.
void launchFunction(
    char const* kernel, LoadedFunction const& loaded, Grid const& grid, void** arguments, CUstream stream);

//! One kernel of an operator, of a struct in generated/<op>_kernels.h.
template <typename Kernel>
class LoadedKernel
{
public:
    //! \throws Error there is no such variant for any device.
    void require(Dtype dtype, View<Constant> constants) const
    {
        requireVariant({Kernel::kNAME, dtype, constants});
    }

    //! Of another constant, before a device is known: the smallest value that `constant` may give.
    int64_t smallest(Dtype dtype, View<Constant> constants, char const* name) const
    {
        return smallestConstant({Kernel::kNAME, dtype, constants}, name);
    }

    //! Loads the variant into the current context. Constants that are not given are the variant table's choice.
    void load(Dtype dtype, View<Constant> constants)
    {
        mLoaded = loadFunction({Kernel::kNAME, dtype, constants});
        for (size_t i = 0; i < mGridConstants.size(); ++i)
        {
            mGridConstants[i] = constantOf(*mLoaded.cubin, Kernel::kGRID_CONSTANTS[i]);
        }
    }

    //! Of another constant, in the variant that is loaded.
    int64_t constant(char const* name) const
    {
        return constantOf(loaded(), name);
    }

    //! \param values has a member for every argument and size of the kernel.
    template <typename Values>
    void launch(Values const& values, CUstream stream) const
    {
        Cubin const& cubin = loaded();
        auto arguments = Kernel::arguments(values);
        auto addresses = Kernel::addresses(arguments);
        auto const grid = Kernel::grid(values, mGridConstants);
        launchFunction(Kernel::kNAME, {mLoaded.function, &cubin}, grid, addresses.data(), stream);
    }

private:
    Cubin const& loaded() const
    {
        if (mLoaded.cubin == nullptr)
        {
            throw Error(std::string("kernel ") + Kernel::kNAME + " to be loaded", "no such shapes were announced",
                "call onShapeChange before enqueue");
        }
        return *mLoaded.cubin;
    }

    LoadedFunction mLoaded;
    typename Kernel::GridConstants mGridConstants{};
};

} // namespace edgeattn
