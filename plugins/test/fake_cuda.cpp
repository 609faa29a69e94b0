//! A libcuda.so.1 that does nothing and writes down what it was asked, for tests of the launcher.
//!
//! A "cubin" is the text "fake NAME TYPES\n": the name is written down, and the types say how to read the arguments,
//! one letter each, p for pointers, i for int32, f for fp32. The environment says how it behaves:
//!   FAKE_CUDA_LOG     file to append to
//!   FAKE_CUDA_FAIL    "FUNCTION=CODE" or "FUNCTION=CODE@N", the Nth call only
//!   FAKE_CUDA_SM      compute capability of the device (default 87)
//!   FAKE_CUDA_SHARED  bytes of shared memory a block can have (default 166912)
#include <cuda.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <string>

namespace
{

struct Module
{
    std::string name;
    std::string types;
};

std::mutex gMutex;
std::atomic<CUcontext> gCurrent{nullptr};
std::atomic<unsigned long long> gResets{0};
unsigned gCalls = 0;

char const* setting(char const* name, char const* usual)
{
    char const* const value = std::getenv(name);
    return value == nullptr ? usual : value;
}

void note(std::string const& line)
{
    std::lock_guard<std::mutex> const lock(gMutex);
    if (std::FILE* const file = std::fopen(setting("FAKE_CUDA_LOG", "/dev/null"), "a"))
    {
        std::fprintf(file, "%s\n", line.c_str());
        std::fclose(file);
    }
}

//! What the environment wants this call to give.
CUresult outcome(char const* function)
{
    std::string const wish = setting("FAKE_CUDA_FAIL", "");
    size_t const equals = wish.find('=');
    if (equals == std::string::npos || wish.substr(0, equals) != function)
    {
        return CUDA_SUCCESS;
    }
    size_t const at = wish.find('@');
    std::lock_guard<std::mutex> const lock(gMutex);
    bool const fails = at == std::string::npos || ++gCalls == std::stoul(wish.substr(at + 1));
    return fails ? static_cast<CUresult>(std::stoi(wish.substr(equals + 1))) : CUDA_SUCCESS;
}

std::string textOf(std::string const& types, void** arguments)
{
    std::ostringstream text;
    for (size_t i = 0; i < types.size(); ++i)
    {
        text << (i == 0 ? "" : ",");
        switch (types[i])
        {
        case 'p': text << *static_cast<void**>(arguments[i]); break;
        case 'i': text << *static_cast<int*>(arguments[i]); break;
        default: text << *static_cast<float*>(arguments[i]);
        }
    }
    return text.str();
}

} // namespace

extern "C"
{

CUresult cuInit(unsigned)
{
    return outcome("cuInit");
}

CUresult cuDeviceGet(CUdevice* device, int ordinal)
{
    *device = ordinal;
    return outcome("cuDeviceGet");
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice)
{
    *context = reinterpret_cast<CUcontext>(uintptr_t{1});
    return outcome("cuDevicePrimaryCtxRetain");
}

//! Contexts are called like before, but are others.
CUresult cuDevicePrimaryCtxReset(CUdevice)
{
    ++gResets;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    gCurrent = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context)
{
    *context = gCurrent;
    return outcome("cuCtxGetCurrent");
}

CUresult cuCtxGetId(CUcontext context, unsigned long long* id)
{
    *id = reinterpret_cast<uintptr_t>(context) + 1000 * gResets;
    return outcome("cuCtxGetId");
}

CUresult cuCtxGetDevice(CUdevice* device)
{
    *device = 0;
    return outcome("cuCtxGetDevice");
}

CUresult cuCtxSynchronize(void)
{
    return outcome("cuCtxSynchronize");
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice)
{
    int const sm = std::atoi(setting("FAKE_CUDA_SM", "87"));
    switch (attribute)
    {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = sm / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = sm % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = std::atoi(setting("FAKE_CUDA_SHARED", "166912"));
        break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return outcome("cuDeviceGetAttribute");
}

CUresult cuGetErrorName(CUresult error, char const** name)
{
    *name = error == CUDA_ERROR_NO_BINARY_FOR_GPU ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_FAKE";
    return outcome("cuGetErrorName");
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t size)
{
    void* memory = nullptr;
    *address = posix_memalign(&memory, 256, size + 1) == 0 ? reinterpret_cast<CUdeviceptr>(memory) : 0;
    return outcome("cuMemAlloc");
}

CUresult cuMemcpyHtoD(CUdeviceptr to, void const* from, size_t size)
{
    std::memcpy(reinterpret_cast<void*>(to), from, size);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t size)
{
    std::memcpy(to, reinterpret_cast<void*>(from), size);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, void const* image)
{
    std::istringstream text(static_cast<char const*>(image));
    std::string magic;
    auto* const loaded = new Module;
    text >> magic >> loaded->name >> loaded->types;
    CUresult const result = magic == "fake" ? outcome("cuModuleLoadData") : CUDA_ERROR_INVALID_IMAGE;
    note("cuModuleLoadData " + loaded->name + (result == CUDA_SUCCESS ? "" : " failed"));
    *module = reinterpret_cast<CUmodule>(loaded);
    return result;
}

CUresult cuModuleUnload(CUmodule module)
{
    note("cuModuleUnload " + reinterpret_cast<Module*>(module)->name);
    delete reinterpret_cast<Module*>(module);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name)
{
    *function = reinterpret_cast<CUfunction>(module);
    note(std::string("cuModuleGetFunction ") + name);
    return outcome("cuModuleGetFunction");
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value)
{
    note("cuFuncSetAttribute " + reinterpret_cast<Module*>(function)->name + " " + std::to_string(attribute) + " "
        + std::to_string(value));
    return outcome("cuFuncSetAttribute");
}

CUresult cuLaunchKernel(CUfunction function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
    unsigned blockY, unsigned blockZ, unsigned sharedMemory, CUstream stream, void** arguments, void**)
{
    auto const& module = *reinterpret_cast<Module*>(function);
    std::ostringstream line;
    line << "cuLaunchKernel " << module.name << " grid=" << gridX << "," << gridY << "," << gridZ << " block=" << blockX
         << "," << blockY << "," << blockZ << " shared=" << sharedMemory << " stream=" << stream
         << " arguments=" << textOf(module.types, arguments);
    note(line.str());
    return outcome("cuLaunchKernel");
}

} // extern "C"
