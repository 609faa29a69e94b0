#include "core/launcher.h"
#include "edgeattn/error.hpp"

#include <map>
#include <mutex>

namespace edgeattn
{
namespace
{

//! More must be asked for, function by function.
constexpr uint32_t kUSUAL_SHARED_MEMORY = 48 * 1024;

constexpr int64_t kMAX_GRID_X = 0x7fffffff;
constexpr int64_t kMAX_GRID_YZ = 0xffff;

//! What was loaded into one context. It is never unloaded: contexts take their modules with them.
struct Context
{
    int32_t sm{0};
    int32_t maxSharedMemory{0};
    std::map<Cubin const*, CUfunction> functions;
};

//! Names the current context. Addresses of contexts are used again after a device reset, numbers are not.
uint64_t currentContext(Driver const& driver)
{
    CUcontext context = nullptr;
    driver.check(driver.cuCtxGetCurrent(&context), "cuCtxGetCurrent", "give the current context");
    if (context == nullptr)
    {
        throw Error("a CUDA context that is current in this thread", "there is none",
            "select a device (cudaSetDevice) before TensorRT is called");
    }
    unsigned long long id = reinterpret_cast<uintptr_t>(context);
    if (driver.cuCtxGetId != nullptr)
    {
        driver.check(driver.cuCtxGetId(context, &id), "cuCtxGetId", "number the current context");
    }
    return id;
}

int32_t attributeOf(Driver const& driver, CUdevice device, CUdevice_attribute attribute)
{
    int value = 0;
    driver.check(driver.cuDeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute", "describe the device");
    return value;
}

Context describe(Driver const& driver)
{
    CUdevice device = 0;
    driver.check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice", "give the device of the current context");
    Context context;
    context.sm = 10 * attributeOf(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        + attributeOf(driver, device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    context.maxSharedMemory = attributeOf(driver, device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    return context;
}

CUfunction findFunction(Driver const& driver, Cubin const& cubin, CUmodule module, char const* kernel)
{
    CUfunction function = nullptr;
    driver.check(driver.cuModuleGetFunction(&function, module, cubin.entry), "cuModuleGetFunction",
        std::string("find ") + cubin.entry + " of kernel " + kernel);
    if (cubin.sharedMemory > kUSUAL_SHARED_MEMORY)
    {
        driver.check(driver.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                         static_cast<int>(cubin.sharedMemory)),
            "cuFuncSetAttribute", std::string("give kernel ") + kernel + " its shared memory");
    }
    return function;
}

CUfunction loadCubin(Driver const& driver, Cubin const& cubin, Context const& context, char const* kernel)
{
    if (static_cast<int64_t>(cubin.sharedMemory) > context.maxSharedMemory)
    {
        throw Error(std::string("a device with ") + std::to_string(cubin.sharedMemory)
                + " bytes of shared memory per block for kernel " + kernel,
            "this one has " + std::to_string(context.maxSharedMemory),
            "build the library with a smaller variant of it");
    }
    CUmodule module = nullptr;
    driver.check(
        driver.cuModuleLoadData(&module, cubin.image), "cuModuleLoadData", std::string("load kernel ") + kernel);
    try
    {
        return findFunction(driver, cubin, module, kernel);
    }
    catch (...)
    {
        driver.cuModuleUnload(module); // it would be loaded once more by the next attempt
        throw;
    }
}

} // namespace

LoadedFunction loadFunction(Wanted const& wanted)
{
    static std::mutex mutex;
    static std::map<uint64_t, Context> contexts;

    Driver const& driver = Driver::get();
    uint64_t const id = currentContext(driver);
    std::lock_guard<std::mutex> const lock(mutex);
    auto place = contexts.find(id);
    if (place == contexts.end())
    {
        place = contexts.emplace(id, describe(driver)).first;
    }
    Context& context = place->second;
    Cubin const& cubin = findCubin(wanted, context.sm);
    auto function = context.functions.find(&cubin);
    if (function == context.functions.end())
    {
        function = context.functions.emplace(&cubin, loadCubin(driver, cubin, context, wanted.kernel)).first;
    }
    return {function->second, &cubin};
}

void launchFunction(
    char const* kernel, LoadedFunction const& loaded, Grid const& grid, void** arguments, CUstream stream)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
    {
        return;
    }
    if (grid.x > kMAX_GRID_X || grid.y > kMAX_GRID_YZ || grid.z > kMAX_GRID_YZ)
    {
        throw Error(std::string("at most 2147483647 x 65535 x 65535 blocks of kernel ") + kernel,
            "the shapes need " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x "
                + std::to_string(grid.z),
            "use a smaller batch");
    }
    Driver const& driver = Driver::get();
    Cubin const& cubin = *loaded.cubin;
    CUresult const result
        = driver.cuLaunchKernel(loaded.function, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
            static_cast<unsigned>(grid.z), cubin.threads, 1, 1, cubin.sharedMemory, stream, arguments, nullptr);
    if (result != CUDA_SUCCESS) // checked here, so that the sentence is only put together when it is needed
    {
        driver.check(result, "cuLaunchKernel", std::string("start kernel ") + kernel);
    }
}

} // namespace edgeattn
