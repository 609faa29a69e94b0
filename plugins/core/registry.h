//! The compiled kernels in this library.
#pragma once

#include "core/op_info.h"

#include <cstdint>

namespace edgeattn
{

//! One compile-time constant of a kernel.
struct Constant
{
    char const* name;
    int64_t value;
};

//! One kernel compiled for one dtype, set of constants and compute capability.
struct Cubin
{
    int32_t sm;
    Dtype dtype;
    View<Constant> constants;
    char const* entry;
    uint32_t threads;      //!< of a block
    uint32_t sharedMemory; //!< bytes, dynamic
    void const* image;
};

struct KernelCubins
{
    char const* name;
    View<Cubin> cubins;
};

// Defined in the registry.cpp that edgeattn.engine.embed_cubins writes.
extern View<KernelCubins> const kKERNELS;
extern char const kKERNELS_SHA256[];

//! Which compiled kernel an operator asks for. Constants it does not name are the variant table's choice; of several
//! variants the first in the manifest is taken, which has the smallest.
struct Wanted
{
    char const* kernel;
    Dtype dtype;
    View<Constant> constants;
};

//! The cubin for a device: of its own compute capability, else of the highest lower one whose code it runs.
//!
//! \throws Error naming what is missing and what is there.
Cubin const& findCubin(Wanted const& wanted, int32_t sm);

//! As findCubin, for a device that is not known yet.
void requireVariant(Wanted const& wanted);

//! The smallest value of another constant among all devices' variants.
//!
//! \throws Error there is no variant, or no such constant.
int64_t smallestConstant(Wanted const& wanted, char const* name);

//! Whether any kernel of an operator is there, in any dtype or in the given one.
bool hasKernels(OpInfo const& op) noexcept;
bool hasKernels(OpInfo const& op, Dtype dtype) noexcept;

//! \throws Error there is no constant of this name.
int64_t constantOf(Cubin const& cubin, char const* name);

} // namespace edgeattn
