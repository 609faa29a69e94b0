//! The CUDA driver API, opened at run time: the library loads where there is no driver, and links none.
#pragma once

#include <cuda.h>

#include <string>

namespace edgeattn
{

//! The functions the launcher calls, under the names that libcuda exports.
struct Driver
{
    CUresult (*cuCtxGetCurrent)(CUcontext*);
    CUresult (*cuCtxGetDevice)(CUdevice*);
    CUresult (*cuCtxGetId)(CUcontext, unsigned long long*); //!< null before CUDA 12
    CUresult (*cuDeviceGetAttribute)(int*, CUdevice_attribute, CUdevice);
    CUresult (*cuFuncSetAttribute)(CUfunction, CUfunction_attribute, int);
    CUresult (*cuGetErrorName)(CUresult, char const**);
    CUresult (*cuLaunchKernel)(
        CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**);
    CUresult (*cuModuleGetFunction)(CUfunction*, CUmodule, char const*);
    CUresult (*cuModuleLoadData)(CUmodule*, void const*);
    CUresult (*cuModuleUnload)(CUmodule);

    //! Opens libcuda on its first call.
    //!
    //! \throws Error there is none, or it lacks a function.
    static Driver const& get();

    //! \throws Error `result` is no success; `what` was done by `function`.
    void check(CUresult result, char const* function, std::string const& what) const;
};

} // namespace edgeattn
