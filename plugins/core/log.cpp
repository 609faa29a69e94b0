#include "core/log.h"
#include "core/exports.h"

#include <NvInferRuntime.h>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <dlfcn.h>

namespace edgeattn
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

//! Longer sentences are cut: where memory has run out there is none for a string either.
constexpr size_t kMAX_SENTENCE = 2048;

// One library serves every TensorRT from 10.3 on, but ILoggerFinder and ILogger have two layouts, and TensorRT's own
// decides, not that of the headers here: from 11 on both derive from IVersionedInterface, whose virtual functions are
// getAPILanguage, getInterfaceInfo and two destructors. Each has one of its own: findLogger and log.
constexpr size_t kVERSIONED = 4;

constexpr int32_t kERROR = 1; //!< ILogger::Severity::kERROR in all of them.

//! The virtual function at a place of an object's table, which takes the object first (Itanium C++ ABI, 2.5).
template <typename Function>
Function* virtualFunction(void* object, size_t place) noexcept
{
    return reinterpret_cast<Function*>((*static_cast<void***>(object))[place]);
}

//! What getInferLibVersion says in the library that an object's class is from, or in one that this library needs; 0
//! where there is no such function.
int32_t tensorRTVersion(void* object) noexcept
{
    Dl_info from{};
    if (dladdr(*static_cast<void**>(object), &from) == 0)
    {
        return 0;
    }
    void* const library = dlopen(from.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    // A program that TensorRT is linked into cannot be opened by its name; it may export the function.
    void* const symbol = dlsym(library == nullptr ? RTLD_DEFAULT : library, "getInferLibVersion");
    int32_t const version = symbol == nullptr ? 0 : reinterpret_cast<int32_t (*)() noexcept>(symbol)();
    if (library != nullptr)
    {
        dlclose(library);
    }
    return version;
}

//! \return whether TensorRT's logger was told.
bool tellTensorRT(void* finder, char const* sentence) noexcept
{
    int32_t const version = tensorRTVersion(finder); // (major * 100 + minor) * 100 + patch
    bool const ten = version >= 100000 && version < 110000;
    // TensorRT-RTX, whose major is 1, has the layout of TensorRT 11; its releases before 1.6 were not looked at.
    bool const rtx = version >= 10600 && version < 20000;
    if (!ten && !rtx && version < 110000)
    {
        return false;
    }
    size_t const own = ten ? 0 : kVERSIONED;
    void* const logger = virtualFunction<void*(void*)>(finder, own)(finder);
    if (logger != nullptr)
    {
        virtualFunction<void(void*, int32_t, char const*)>(logger, own)(logger, kERROR, sentence);
    }
    return logger != nullptr;
}

} // namespace

void logError(char const* op, char const* method, char const* sentence) noexcept
{
    std::array<char, kMAX_SENTENCE> text;
    std::snprintf(text.data(), text.size(), "edgeattn: %s: %s: %s", op, method, sentence);
    nvinfer1::ILoggerFinder* const finder = gLoggerFinder.load();
    if (finder == nullptr || !tellTensorRT(finder, text.data()))
    {
        std::fprintf(stderr, "%s\n", text.data());
    }
}

} // namespace edgeattn

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    edgeattn::gLoggerFinder = finder;
}
