#include "gpu.h"

#include "edgeattn/error.hpp"

#include <algorithm>
#include <exception>
#include <stdexcept>

namespace edgeattn
{
namespace
{

char const* const kLibrary = "libcuda.so.1";
constexpr unsigned kNonBlocking = 1;          // CU_STREAM_NON_BLOCKING
constexpr int kThreadLocal = 1;               // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
constexpr int kMajor = 75, kMinor = 76;       // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

} // namespace

// Types as in cuda.h, whose handles are pointers and whose enumerations are int.
struct Gpu::Driver
{
    int (*cuGetErrorString)(int, char const**) = nullptr;
    int (*cuInit)(unsigned) = nullptr;
    int (*cuDeviceGet)(int*, int) = nullptr;
    int (*cuDeviceGetAttribute)(int*, int, int) = nullptr;
    int (*cuDevicePrimaryCtxRetain)(void**, int) = nullptr;
    int (*cuDevicePrimaryCtxRelease)(int) = nullptr;
    int (*cuCtxPushCurrent)(void*) = nullptr;
    int (*cuCtxPopCurrent)(void**) = nullptr;
    int (*cuStreamCreate)(void**, unsigned) = nullptr;
    int (*cuStreamDestroy)(void*) = nullptr;
    int (*cuStreamSynchronize)(void*) = nullptr;
    int (*cuMemAlloc)(Address*, size_t) = nullptr;
    int (*cuMemFree)(Address) = nullptr;
    int (*cuMemsetD8Async)(Address, unsigned char, size_t, void*) = nullptr;
    int (*cuMemcpyHtoDAsync)(Address, void const*, size_t, void*) = nullptr;
    int (*cuMemcpyDtoHAsync)(void*, Address, size_t, void*) = nullptr;
    // Null in drivers that are older than they are.
    int (*cuStreamBeginCapture)(void*, int) = nullptr;
    int (*cuStreamEndCapture)(void*, void**) = nullptr;
    int (*cuGraphInstantiate)(void**, void*, unsigned long long) = nullptr;
    int (*cuGraphLaunch)(void*, void*) = nullptr;
    int (*cuGraphDestroy)(void*) = nullptr;
    int (*cuGraphExecDestroy)(void*) = nullptr;

    //! \throws std::runtime_error a clause that says what is missing.
    static Driver open();

    bool records() const
    {
        return cuStreamBeginCapture && cuStreamEndCapture && cuGraphInstantiate && cuGraphLaunch && cuGraphDestroy
            && cuGraphExecDestroy;
    }

    //! \throws std::runtime_error the driver's own words.
    void check(int code, char const* function) const
    {
        if (code)
        {
            char const* text = nullptr;
            (void)cuGetErrorString(code, &text);
            throw std::runtime_error(
                std::string(function) + " says: " + (text ? text : "error " + std::to_string(code)));
        }
    }

    //! \throws Error kRuntimeInput: with the driver's own words.
    void work(int code, char const* function) const
    {
        try
        {
            check(code, function);
        }
        catch (std::runtime_error const& error)
        {
            throw Error(ErrorCode::kRuntimeInput, "the GPU to finish its work", error.what(),
                "restart the program, for the driver's context may be lost");
        }
    }
};

Gpu::Driver Gpu::Driver::open()
{
    SharedLibrary const library(kLibrary);
    if (!library.is_open())
    {
        throw std::runtime_error(std::string("there is no ") + kLibrary);
    }
    Driver driver;
    bool const whole = library.find(driver.cuGetErrorString, "cuGetErrorString")
        && library.find(driver.cuInit, "cuInit") && library.find(driver.cuDeviceGet, "cuDeviceGet")
        && library.find(driver.cuDeviceGetAttribute, "cuDeviceGetAttribute")
        && library.find(driver.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain")
        && library.find(driver.cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2")
        && library.find(driver.cuCtxPushCurrent, "cuCtxPushCurrent_v2")
        && library.find(driver.cuCtxPopCurrent, "cuCtxPopCurrent_v2")
        && library.find(driver.cuStreamCreate, "cuStreamCreate")
        && library.find(driver.cuStreamDestroy, "cuStreamDestroy_v2")
        && library.find(driver.cuStreamSynchronize, "cuStreamSynchronize")
        && library.find(driver.cuMemAlloc, "cuMemAlloc_v2") && library.find(driver.cuMemFree, "cuMemFree_v2")
        && library.find(driver.cuMemsetD8Async, "cuMemsetD8Async")
        && library.find(driver.cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2")
        && library.find(driver.cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
    if (!whole)
    {
        throw std::runtime_error(std::string(kLibrary) + " is not the driver's");
    }
    library.find(driver.cuStreamBeginCapture, "cuStreamBeginCapture_v2");
    library.find(driver.cuStreamEndCapture, "cuStreamEndCapture");
    library.find(driver.cuGraphInstantiate, "cuGraphInstantiateWithFlags");
    library.find(driver.cuGraphLaunch, "cuGraphLaunch");
    library.find(driver.cuGraphDestroy, "cuGraphDestroy");
    library.find(driver.cuGraphExecDestroy, "cuGraphExecDestroy");
    return driver;
}

struct Recording
{
    void* exec;
};

namespace
{

[[noreturn]] void no_gpu(std::string const& problem)
{
    throw Error(ErrorCode::kMissing, "an NVIDIA GPU to run an engine on", "there is none that works (" + problem + ")",
        "run it on the device, or use ONNX Runtime here");
}

} // namespace

Gpu::Gpu()
try : mDriver(std::make_unique<Driver const>(Driver::open()))
{
    mDriver->check(mDriver->cuInit(0), "cuInit");
    mDriver->check(mDriver->cuDeviceGet(&mDevice, 0), "cuDeviceGet");
    mDriver->check(mDriver->cuDevicePrimaryCtxRetain(&mContext, mDevice), "cuDevicePrimaryCtxRetain");
    int failed = mDriver->cuCtxPushCurrent(mContext);
    char const* function = "cuCtxPushCurrent_v2";
    if (!failed)
    {
        failed = mDriver->cuStreamCreate(&mStream, kNonBlocking);
        function = "cuStreamCreate";
        void* popped = nullptr;
        (void)mDriver->cuCtxPopCurrent(&popped);
    }
    if (failed)
    {
        (void)mDriver->cuDevicePrimaryCtxRelease(mDevice); // no destructor will
    }
    mDriver->check(failed, function);
}
catch (std::runtime_error const& error)
{
    no_gpu(error.what());
}

Gpu::~Gpu()
{
    (void)mDriver->cuStreamDestroy(mStream);
    (void)mDriver->cuDevicePrimaryCtxRelease(mDevice);
}

Gpu::Current::Current(Gpu const& gpu)
    : mGpu(gpu)
{
    gpu.mDriver->work(gpu.mDriver->cuCtxPushCurrent(gpu.mContext), "cuCtxPushCurrent_v2");
}

Gpu::Current::~Current()
{
    void* popped = nullptr;
    (void)mGpu.mDriver->cuCtxPopCurrent(&popped);
}

Gpu::Settled::Settled(Gpu const& gpu)
    : mGpu(gpu)
    , mExceptions(std::uncaught_exceptions())
{
}

Gpu::Settled::~Settled()
{
    if (std::uncaught_exceptions() > mExceptions)
    {
        (void)mGpu.mDriver->cuStreamSynchronize(mGpu.mStream);
    }
}

template <typename Free>
void Gpu::quietly(Free free) const noexcept
{
    void* popped = nullptr;
    if (mDriver->cuCtxPushCurrent(mContext) == 0)
    {
        free();
        (void)mDriver->cuCtxPopCurrent(&popped);
    }
}

int64_t Gpu::sm() const
{
    int major = 0, minor = 0;
    mDriver->work(mDriver->cuDeviceGetAttribute(&major, kMajor, mDevice), "cuDeviceGetAttribute");
    mDriver->work(mDriver->cuDeviceGetAttribute(&minor, kMinor, mDevice), "cuDeviceGetAttribute");
    return major * 10 + minor;
}

std::shared_ptr<Gpu::Address const> Gpu::allocate(size_t bytes) const
{
    Address address = 0;
    try
    {
        mDriver->check(mDriver->cuMemAlloc(&address, std::max<size_t>(bytes, 1)), "cuMemAlloc_v2");
    }
    catch (std::runtime_error const& error)
    {
        throw Error(ErrorCode::kRuntimeInput, std::to_string(bytes) + " bytes of free memory on the GPU", error.what(),
            "close other programs, or give fewer rows or tokens");
    }
    return {new Address(address), [this](Address const* held) {
                quietly([&] { (void)mDriver->cuMemFree(*held); });
                delete held;
            }};
}

void Gpu::clear(Address to, size_t bytes) const
{
    if (bytes)
    {
        mDriver->work(mDriver->cuMemsetD8Async(to, 0, bytes, mStream), "cuMemsetD8Async");
    }
}

void Gpu::upload(Address to, void const* from, size_t bytes) const
{
    if (bytes)
    {
        mDriver->work(mDriver->cuMemcpyHtoDAsync(to, from, bytes, mStream), "cuMemcpyHtoDAsync_v2");
    }
}

void Gpu::download(void* to, Address from, size_t bytes) const
{
    if (bytes)
    {
        mDriver->work(mDriver->cuMemcpyDtoHAsync(to, from, bytes, mStream), "cuMemcpyDtoHAsync_v2");
    }
}

void Gpu::synchronize() const
{
    mDriver->work(mDriver->cuStreamSynchronize(mStream), "cuStreamSynchronize");
}

bool Gpu::begin_recording() const
{
    return mDriver->records() && mDriver->cuStreamBeginCapture(mStream, kThreadLocal) == 0;
}

std::shared_ptr<Recording const> Gpu::end_recording(bool complete) const
{
    void* graph = nullptr;
    bool const ended = mDriver->cuStreamEndCapture(mStream, &graph) == 0 && graph;
    void* exec = nullptr;
    bool const instantiated = ended && complete && mDriver->cuGraphInstantiate(&exec, graph, 0) == 0;
    if (ended)
    {
        (void)mDriver->cuGraphDestroy(graph);
    }
    if (!instantiated)
    {
        return nullptr;
    }
    return {new Recording{exec}, [this](Recording const* recording) {
                quietly([&] { (void)mDriver->cuGraphExecDestroy(recording->exec); });
                delete recording;
            }};
}

void Gpu::replay(Recording const& recording) const
{
    mDriver->work(mDriver->cuGraphLaunch(recording.exec, mStream), "cuGraphLaunch");
}

} // namespace edgeattn
