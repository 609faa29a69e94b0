#include "edgeattn/bundle.hpp"
#include "edgeattn/edgeattn.h"
#include "edgeattn/sampling.hpp"

#include <exception>
#include <string>

struct edgeattn_bundle
{
    edgeattn::Bundle bundle;
};

namespace
{

thread_local std::string gLastError;

edgeattn_code failed(edgeattn_code code, char const* sentence) noexcept
{
    try
    {
        gLastError = sentence;
    }
    catch (...)
    {
        gLastError.clear(); // no memory for the sentence: the code alone has to do
    }
    return code;
}

//! Runs what may throw; every exception becomes a code.
template <typename Body>
edgeattn_code guarded(bool complete, Body body) noexcept
{
    if (!complete)
    {
        return failed(EDGEATTN_USAGE, "expected pointers to all arguments, but one is null: pass all of them");
    }
    try
    {
        body();
        return EDGEATTN_OK;
    }
    catch (edgeattn::Error const& error)
    {
        return failed(static_cast<edgeattn_code>(error.code()), error.what());
    }
    catch (std::exception const& error)
    {
        return failed(EDGEATTN_INTERNAL, error.what());
    }
    catch (...)
    {
        return failed(EDGEATTN_INTERNAL, "expected to finish, but an unknown exception came: report this");
    }
}

} // namespace

char const* edgeattn_version(void)
{
    return EDGEATTN_VERSION;
}

char const* edgeattn_last_error(void)
{
    return gLastError.c_str();
}

edgeattn_code edgeattn_bundle_open(char const* path, int check_hashes, edgeattn_bundle** bundle)
{
    return guarded(path && bundle,
        [&] { *bundle = new edgeattn_bundle{edgeattn::Bundle::open(path, check_hashes != 0)}; });
}

char const* edgeattn_bundle_target(edgeattn_bundle const* bundle)
{
    return bundle ? bundle->bundle.manifest.target.name.c_str() : "";
}

void edgeattn_bundle_close(edgeattn_bundle* bundle)
{
    delete bundle;
}

edgeattn_code edgeattn_pick(
    edgeattn_sampling const* sampling, float const* logits, size_t vocabulary, uint64_t index, int64_t* token)
{
    return guarded(sampling && logits && token, [&] {
        edgeattn::Sampling const chosen{sampling->temperature, sampling->top_k, sampling->top_p, sampling->seed};
        *token = chosen.pick(logits, vocabulary, index);
    });
}
