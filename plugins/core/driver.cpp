#include "core/driver.h"
#include "edgeattn/error.hpp"

#include <dlfcn.h>

// Headers rename functions to their newest version or to one of another default stream: what is looked
// up here are the first versions, which every driver has.
#undef cuLaunchKernel

namespace edgeattn
{
namespace
{

constexpr char const* kLIBRARY = "libcuda.so.1";

template <typename Function>
void find(void* library, char const* name, Function*& function)
{
    function = reinterpret_cast<Function*>(dlsym(library, name));
}

template <typename Function>
void require(void* library, char const* name, Function*& function)
{
    find(library, name, function);
    if (function == nullptr)
    {
        throw Error(
            std::string(kLIBRARY) + " with the function " + name, "it has none", "install a newer NVIDIA driver");
    }
}

Driver open()
{
    void* const library = dlopen(kLIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        char const* const reason = dlerror();
        throw Error(std::string("NVIDIA's driver library ") + kLIBRARY,
            reason == nullptr ? "it cannot be opened" : reason, "run on a machine with an NVIDIA GPU and its driver");
    }
    Driver driver{};
    require(library, "cuCtxGetCurrent", driver.cuCtxGetCurrent);
    require(library, "cuCtxGetDevice", driver.cuCtxGetDevice);
    find(library, "cuCtxGetId", driver.cuCtxGetId);
    require(library, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute);
    require(library, "cuFuncSetAttribute", driver.cuFuncSetAttribute);
    require(library, "cuGetErrorName", driver.cuGetErrorName);
    require(library, "cuLaunchKernel", driver.cuLaunchKernel);
    require(library, "cuModuleGetFunction", driver.cuModuleGetFunction);
    require(library, "cuModuleLoadData", driver.cuModuleLoadData);
    require(library, "cuModuleUnload", driver.cuModuleUnload);
    return driver;
}

} // namespace

Driver const& Driver::get()
{
    // The library stays open: its functions are called until the process ends.
    static Driver const driver = open();
    return driver;
}

void Driver::check(CUresult result, char const* function, std::string const& what) const
{
    if (result == CUDA_SUCCESS)
    {
        return;
    }
    char const* name = nullptr;
    if (cuGetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr)
    {
        name = "an unknown error";
    }
    throw Error(std::string(function) + " to " + what,
        std::string("it gave ") + name + " (" + std::to_string(result) + ")",
        "see the CUDA driver's documentation of this error; an earlier kernel of the process may have caused it");
}

} // namespace edgeattn
