//! See edgeattn/edgeattn.h.
#include "edgeattn/edgeattn.h"
#include "edgeattn/error.hpp"
#include "edgeattn/sampling.hpp"

#include <exception>
#include <string>

namespace
{

thread_local std::string lastError;

edgeattn_code refuse(edgeattn_code code, char const* sentence) noexcept
{
    try
    {
        lastError = sentence;
    }
    catch (...) // no memory for the sentence; the code says enough
    {
        lastError.clear();
    }
    return code;
}

//! Calls a function that may throw, and turns what it throws into a code.
template <typename Function>
edgeattn_code guarded(Function function) noexcept
{
    lastError.clear();
    try
    {
        function();
        return EDGEATTN_OK;
    }
    catch (edgeattn::Error const& error)
    {
        return refuse(static_cast<edgeattn_code>(error.code()), error.what());
    }
    catch (std::exception const& error)
    {
        return refuse(EDGEATTN_INTERNAL, error.what());
    }
}

} // namespace

edgeattn_code edgeattn_pick(edgeattn_sampling const* sampling, float const* logits, size_t vocabulary, uint64_t index,
    int64_t* token)
{
    return guarded([&] {
        if (sampling == nullptr || token == nullptr)
            throw edgeattn::Error("a sampling and a place for the token", "one is NULL", "pass both",
                edgeattn::ErrorCode::usage);
        edgeattn::Sampling const chosen{
            sampling->temperature, static_cast<std::size_t>(sampling->top_k), sampling->top_p, sampling->seed};
        *token = chosen.pick(logits, vocabulary, index);
    });
}

char const* edgeattn_last_error(void)
{
    return lastError.c_str();
}
