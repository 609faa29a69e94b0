//! One thread at a time.
#pragma once

#include "edgeattn/error.hpp"

#include <atomic>

namespace edgeattn
{

//! Held while a call uses a session.
class Turn
{
public:
    //! \throws Error kUsage: another thread holds it.
    explicit Turn(std::atomic_flag& busy)
        : mBusy(busy)
    {
        if (busy.test_and_set(std::memory_order_acquire))
        {
            throw Error(ErrorCode::kUsage, "one thread in a session at a time", "another one is in a call",
                "open a session for each thread, or let them take turns");
        }
    }

    ~Turn()
    {
        mBusy.clear(std::memory_order_release);
    }

    Turn(Turn const&) = delete;
    Turn& operator=(Turn const&) = delete;

private:
    std::atomic_flag& mBusy;
};

} // namespace edgeattn
