//! The boundary to TensorRT: no exception crosses it, each is told to TensorRT's logger.
#pragma once

#include <exception>

namespace edgeattn
{

//! Tells TensorRT's logger, or standard error where TensorRT gave none.
//!
//! \param op, method what TensorRT called.
//! \param sentence what went wrong.
void logError(char const* op, char const* method, char const* sentence) noexcept;

//! Runs what may throw on behalf of a method that may not.
//!
//! \return whether it ran to its end.
template <typename Body>
bool guarded(char const* op, char const* method, Body&& body) noexcept
{
    try
    {
        body();
        return true;
    }
    catch (std::exception const& error)
    {
        logError(op, method, error.what());
    }
    catch (...)
    {
        logError(op, method, "an unknown exception was thrown");
    }
    return false;
}

} // namespace edgeattn
