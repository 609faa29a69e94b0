//! TensorRT behind adapter.h, compiled once for each of its ABIs.
//! EDGEATTN_TENSORRT_LIBRARY is the library it opens, EDGEATTN_TENSORRT_MAJOR and EDGEATTN_TENSORRT_TITLE are that
//! library's, EDGEATTN_TENSORRT_HEADERS is the major of the headers, whose classes have the library's layout.
#include "adapter.h"

#include "edgeattn/error.hpp"
#include "shared_library.h"

#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <cstdio>
#include <dlfcn.h>
#include <memory>
#include <mutex>
#include <vector>

#if NV_TENSORRT_MAJOR != EDGEATTN_TENSORRT_HEADERS
#error "these are the headers of another TensorRT"
#endif

namespace edgeattn
{
namespace
{

namespace trt = nvinfer1;

//! Keeps the last error. TensorRT holds on to the first logger of a process to its end, so there is one, for ever.
class ErrorLog final : public trt::ILogger
{
public:
    static ErrorLog& get()
    {
        static ErrorLog* const log = new ErrorLog;
        return *log;
    }

    void log(Severity severity, trt::AsciiChar const* message) noexcept override
    {
        if (severity <= Severity::kERROR) // and kINTERNAL_ERROR
        {
            std::lock_guard const lock(mMutex);
            std::snprintf(mLast, sizeof mLast, "%s", message);
        }
    }

    void copy(char* text, size_t bytes) noexcept
    {
        std::lock_guard const lock(mMutex);
        std::snprintf(text, bytes, "%s", mLast);
    }

    void clear() noexcept
    {
        std::lock_guard const lock(mMutex);
        mLast[0] = '\0';
    }

private:
    std::mutex mMutex;
    char mLast[sizeof(Refusal::tensorrt)] = "";
};

//! The functions by which TensorRT's library is entered, and its version.
struct Library
{
    int32_t (*getInferLibVersion)() noexcept = nullptr;
    void* (*createInferRuntime)(void* logger, int32_t version) noexcept = nullptr;
    int32_t major = 0, minor = 0, patch = 0;

    //! \throws Error kMissing: it is not there; kLowering: it is another major than this adapter is for.
    static Library open()
    {
        SharedLibrary const file(EDGEATTN_TENSORRT_LIBRARY);
        Library library;
        bool const whole = file.is_open() && file.find(library.getInferLibVersion, "getInferLibVersion")
            && file.find(library.createInferRuntime, "createInferRuntime_INTERNAL");
        if (!whole)
        {
            throw Error(ErrorCode::kMissing, EDGEATTN_TENSORRT_TITLE ", which runs the engine",
                file.is_open() ? EDGEATTN_TENSORRT_LIBRARY " is not its library" : file.problem(),
                "install it, or name its folder in LD_LIBRARY_PATH");
        }
        int32_t const version = library.getInferLibVersion(); // (major * 100 + minor) * 100 + patch
        library.major = version / 10000;
        library.minor = version / 100 % 100;
        library.patch = version % 100;
        if (library.major != EDGEATTN_TENSORRT_MAJOR)
        {
            throw Error(ErrorCode::kLowering,
                EDGEATTN_TENSORRT_TITLE " " + std::to_string(EDGEATTN_TENSORRT_MAJOR) + " in " EDGEATTN_TENSORRT_LIBRARY,
                "it is " + library.version(), "install the TensorRT that built the engine");
        }
        return library;
    }

    std::string version() const
    {
        return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
    }

    //! \throws Error kLowering: another release built the engine.
    void require(std::string const& built) const
    {
        int numbers[3] = {-1, -1, 0};
        std::sscanf(built.c_str(), "%d.%d.%d", numbers, numbers + 1, numbers + 2);
        if (numbers[0] != major || numbers[1] != minor || numbers[2] != patch)
        {
            throw Error(ErrorCode::kLowering,
                "an engine for " EDGEATTN_TENSORRT_TITLE " " + version() + ", which is what this machine has",
                "it was built by " EDGEATTN_TENSORRT_TITLE " " + built, "build one here with edgeattn build");
        }
    }
};

[[noreturn]] void refuse(std::string const& title, std::string const& what, std::string const& todo)
{
    char message[sizeof(Refusal::tensorrt)];
    ErrorLog::get().copy(message, sizeof message);
    throw Error(ErrorCode::kLowering, title + " to " + what,
        *message ? std::string("it says: ") + message : "it gives no reason", todo, message);
}

DataType data_type(trt::DataType type)
{
    switch (type)
    {
    case trt::DataType::kFLOAT: return DataType::kFloat32;
    case trt::DataType::kHALF: return DataType::kFloat16;
    case trt::DataType::kBF16: return DataType::kBfloat16;
    case trt::DataType::kINT8: return DataType::kInt8;
    case trt::DataType::kINT32: return DataType::kInt32;
    case trt::DataType::kINT64: return DataType::kInt64;
    case trt::DataType::kBOOL: return DataType::kBool;
    default: return DataType::kOther;
    }
}

Dims plain(trt::Dims const& from)
{
    Dims dims{from.nbDims, {}};
    for (int32_t i = 0; i < from.nbDims && i < kMostDimensions; ++i)
    {
        dims.sizes[i] = from.d[i];
    }
    return dims;
}

class Engine final : public LoadedEngine
{
public:
    Engine(Library const& library, EngineRequest const& request)
        : mTitle(EDGEATTN_TENSORRT_TITLE " " + library.version())
    {
        ErrorLog::get().clear();
        // The library's own version: what is called here has been in all of this major.
        mRuntime.reset(static_cast<trt::IRuntime*>(
            library.createInferRuntime(&ErrorLog::get(), library.getInferLibVersion())));
        if (!mRuntime)
        {
            refuse(mTitle, "start", "check the driver");
        }
        if (request.plugins)
        {
            // Its code must outlive this runtime: another session may use it, too.
            (void)dlopen(request.plugins, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
            // null, too, where this process has loaded it before; without its operators the engine does not load
            (void)mRuntime->getPluginRegistry().loadLibrary(request.plugins);
        }
        mEngine.reset(mRuntime->deserializeCudaEngine(request.content, request.bytes));
        if (!mEngine)
        {
            refuse(mTitle, "load the engine", "check the driver; else build it with edgeattn build --force");
        }
        for (int32_t profile = 0; profile < mEngine->getNbOptimizationProfiles(); ++profile)
        {
            // Each has the memory its own profile needs: decoding takes far less than reading a prompt.
            mContexts.emplace_back(
                mEngine->createExecutionContext(trt::ExecutionContextAllocationStrategy::kON_PROFILE_CHANGE));
            auto const stream = static_cast<cudaStream_t>(request.stream);
            if (!mContexts.back() || !mContexts.back()->setOptimizationProfileAsync(profile, stream))
            {
                refuse(mTitle, "prepare the engine", "free memory on the GPU");
            }
        }
    }

    void release() noexcept override
    {
        delete this;
    }

    char const* title() const noexcept override
    {
        return mTitle.c_str();
    }

    char const* message() noexcept override
    {
        ErrorLog::get().copy(mMessage, sizeof mMessage);
        return mMessage;
    }

    int32_t tensors() const noexcept override
    {
        return mEngine->getNbIOTensors();
    }

    char const* name(int32_t tensor) const noexcept override
    {
        return mEngine->getIOTensorName(tensor);
    }

    bool is_input(char const* name) const noexcept override
    {
        return mEngine->getTensorIOMode(name) == trt::TensorIOMode::kINPUT;
    }

    DataType dtype(char const* name) const noexcept override
    {
        return data_type(mEngine->getTensorDataType(name));
    }

    Dims shape(char const* name) const noexcept override
    {
        return plain(mEngine->getTensorShape(name));
    }

    int32_t profiles() const noexcept override
    {
        return static_cast<int32_t>(mContexts.size());
    }

    Dims bound(char const* input, int32_t profile, Bound bound) const noexcept override
    {
        return plain(mEngine->getProfileShape(
            input, profile, bound == Bound::kSmallest ? trt::OptProfileSelector::kMIN : trt::OptProfileSelector::kMAX));
    }

    bool set_shape(int32_t profile, char const* input, Dims const& shape) noexcept override
    {
        trt::Dims dims{shape.rank, {}};
        for (int32_t i = 0; i < shape.rank; ++i)
        {
            dims.d[i] = shape.sizes[i];
        }
        ErrorLog::get().clear();
        return context(profile).setInputShape(input, dims);
    }

    Dims output_shape(int32_t profile, char const* output) const noexcept override
    {
        return plain(context(profile).getTensorShape(output));
    }

    bool bind(int32_t profile, char const* name, uint64_t address) noexcept override
    {
        ErrorLog::get().clear();
        return context(profile).setTensorAddress(name, reinterpret_cast<void*>(address));
    }

    bool enqueue(int32_t profile, void* stream) noexcept override
    {
        ErrorLog::get().clear();
        return context(profile).enqueueV3(static_cast<cudaStream_t>(stream));
    }

private:
    trt::IExecutionContext& context(int32_t profile) const
    {
        return *mContexts[static_cast<size_t>(profile)];
    }

    std::string mTitle;
    char mMessage[sizeof(Refusal::tensorrt)] = "";
    // Freed in the opposite order.
    std::unique_ptr<trt::IRuntime> mRuntime;
    std::unique_ptr<trt::ICudaEngine> mEngine;
    std::vector<std::unique_ptr<trt::IExecutionContext>> mContexts;
};

template <size_t Size>
void copy(char (&to)[Size], std::string const& from)
{
    std::snprintf(to, Size, "%s", from.c_str());
}

void tell(Refusal& refusal, Error const& error)
{
    refusal.code = static_cast<int32_t>(error.code());
    copy(refusal.sentence, error.what());
    copy(refusal.tensorrt, error.tensorrt());
}

} // namespace
} // namespace edgeattn

extern "C" EDGEATTN_API edgeattn::LoadedEngine* edgeattnLoadEngine(
    int32_t adapter_abi, edgeattn::EngineRequest const* request, edgeattn::Refusal* refusal) noexcept
{
    using namespace edgeattn;
    try
    {
        if (adapter_abi != kAdapterAbi)
        {
            throw Error(ErrorCode::kInternal, "an adapter of ABI " + std::to_string(adapter_abi),
                "this one has " + std::to_string(kAdapterAbi), "install libedgeattn and its adapters together");
        }
        Library const library = Library::open();
        library.require(request->version);
        return new Engine(library, *request);
    }
    catch (Error const& error)
    {
        tell(*refusal, error);
    }
    catch (std::exception const& error)
    {
        tell(*refusal, Error(ErrorCode::kInternal, "memory for an engine", error.what(), "close other programs"));
    }
    return nullptr;
}
