//! How everything in this library refuses.
#pragma once

#include <stdexcept>
#include <string>

namespace edgeattn
{

//! A refusal that a user can act on: what was expected, what came, what to do.
class Error : public std::runtime_error
{
public:
    Error(std::string const& expected, std::string const& came, std::string const& todo)
        : std::runtime_error("expected " + expected + ", but " + came + ": " + todo)
    {
    }
};

} // namespace edgeattn
