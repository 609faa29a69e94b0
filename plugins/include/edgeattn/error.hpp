//! How edgeattn refuses, in every library of it.
#pragma once

#include <stdexcept>
#include <string>

namespace edgeattn
{

//! What kind of refusal it is; the numbers are those of edgeattn_code in edgeattn.h.
enum class ErrorCode : int
{
    usage = 1, //!< an option outside its range
    input = 2, //!< tokens, logits or sizes that do not fit
    internal = 3 //!< anything else, for one no memory
};

//! A refusal that a user can act on: what was expected, what came, what to do.
class Error : public std::runtime_error
{
public:
    Error(std::string const& expected, std::string const& came, std::string const& todo,
        ErrorCode code = ErrorCode::input)
        : std::runtime_error("expected " + expected + ", but " + came + ": " + todo), code_(code)
    {
    }

    ErrorCode code() const noexcept
    {
        return code_;
    }

private:
    ErrorCode code_;
};

} // namespace edgeattn
