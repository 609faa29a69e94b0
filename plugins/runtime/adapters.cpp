#include "adapters.h"

#include "edgeattn/error.hpp"
#include "shared_library.h"

#include <dlfcn.h>

namespace edgeattn
{
namespace
{

//! The adapter for an engine, as "trt10".
std::string adapter_for(std::string const& flavour, std::string const& version)
{
    std::string const major = version.substr(0, version.find('.'));
    if (flavour == "tensorrt" && (major == "10" || major == "11"))
    {
        return "trt" + major;
    }
    if (flavour == "tensorrt-rtx" && major == "1")
    {
        return "rtx";
    }
    throw Error(ErrorCode::kLowering, "an engine of TensorRT 10 or 11, or of TensorRT-RTX 1",
        "it was built by " + flavour + " " + version, "use an edgeattn that knows this one");
}

//! The folder of the library, or program, that this code is in.
std::string own_folder()
{
    Dl_info found{};
    std::string const file
        = dladdr(reinterpret_cast<void*>(&own_folder), &found) && found.dli_fname ? found.dli_fname : "";
    size_t const slash = file.rfind('/');
    return slash == std::string::npos ? std::string(".") : file.substr(0, slash);
}

} // namespace

LoadedEngine* load_engine(std::string const& flavour, EngineRequest const& request)
{
    std::string const name = "libedgeattn_" + adapter_for(flavour, request.version) + ".so";
    SharedLibrary const library(own_folder() + "/" + name, name);
    LoadEngine* load = nullptr;
    if (!library.is_open() || !library.find(load, "edgeattnLoadEngine"))
    {
        throw Error(ErrorCode::kMissing, name + " beside libedgeattn, which runs engines of this TensorRT",
            library.is_open() ? "it is another library" : "it does not open (" + library.problem() + ")",
            "build libedgeattn where TensorRT's headers are, see EDGEATTN_TENSORRT_INCLUDE");
    }
    Refusal refusal{};
    LoadedEngine* const engine = load(kAdapterAbi, &request, &refusal);
    if (!engine)
    {
        throw Error::said(static_cast<ErrorCode>(refusal.code), refusal.sentence, refusal.tensorrt);
    }
    return engine;
}

} // namespace edgeattn
