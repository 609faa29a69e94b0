//! The logger of a TensorRT, as its version FAKE_TENSORRT_VERSION in the environment says.
//! FAKE_LAYOUT is the major whose classes it has: the headers' own where they are of that major, else as written here.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace
{

#if NV_TENSORRT_MAJOR == FAKE_LAYOUT
using nvinfer1::ILogger;
using nvinfer1::ILoggerFinder;
using Severity = ILogger::Severity;
#else
using Severity = int32_t;

#if FAKE_LAYOUT == 10
class Root
{
protected:
    Root() = default;
};
#else
class Root
{
public:
    //! Whoever takes it for findLogger gets something that is not null, and that nobody can call.
    virtual intptr_t getAPILanguage() const noexcept
    {
        return 1;
    }
    virtual void getInterfaceInfo() const noexcept {}
    virtual ~Root() noexcept = default;
};
#endif

class ILogger : public Root
{
public:
    virtual void log(Severity severity, char const* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class ILoggerFinder : public Root
{
public:
    virtual ILogger* findLogger() = 0;
    virtual ~ILoggerFinder() = default;
};
#endif

class Logger final : public ILogger
{
public:
    void log(Severity severity, char const* message) noexcept override
    {
        std::printf("log %d %s\n", static_cast<int>(severity), message);
        std::fflush(stdout);
    }
};

class Finder final : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        return &mLogger;
    }

private:
    Logger mLogger;
};

} // namespace

extern "C"
{

int32_t getInferLibVersion() noexcept
{
    return std::atoi(std::getenv("FAKE_TENSORRT_VERSION"));
}

void* fakeFinder() noexcept
{
    static Finder finder;
    return &finder;
}
}
