//! The first GPU through the driver's library, which is opened at run time: nothing of CUDA is needed to build or load.
#pragma once

#include "shared_library.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace edgeattn
{

//! Work of a stream that was recorded once and is given to it as a whole.
struct Recording;

//! The first GPU: its primary context, which TensorRT uses too, and a stream of its own.
//! Except `Current`, `memory` and the destructor, calls need a `Current`.
class Gpu
{
public:
    using Address = uint64_t;

    //! \throws Error kMissing: there is no driver or no GPU.
    Gpu();
    ~Gpu();
    Gpu(Gpu const&) = delete;
    Gpu& operator=(Gpu const&) = delete;

    //! Makes the context this thread's; its own comes back afterwards.
    class Current
    {
    public:
        explicit Current(Gpu const& gpu);
        ~Current();
        Current(Current const&) = delete;
        Current& operator=(Current const&) = delete;

    private:
        Gpu const& mGpu;
    };

    //! Waits for the stream when an exception leaves a scope, for the sake of memory it still copies.
    class Settled
    {
    public:
        explicit Settled(Gpu const& gpu);
        ~Settled();
        Settled(Settled const&) = delete;
        Settled& operator=(Settled const&) = delete;

    private:
        Gpu const& mGpu;
        int mExceptions;
    };

    //! Compute capability, as 87.
    int64_t sm() const;

    void* stream() const
    {
        return mStream;
    }

    //! Memory that is freed with its last reference, which must go before the GPU.
    //! \throws Error kRuntimeInput: there is not enough.
    std::shared_ptr<Address const> allocate(size_t bytes) const;

    //! \name Behind what the stream does already.
    //! The host's memory must stay until `synchronize`. \throws Error kRuntimeInput: the GPU fails.
    //! @{
    void clear(Address to, size_t bytes) const;
    void upload(Address to, void const* from, size_t bytes) const;
    void download(void* to, Address from, size_t bytes) const;
    void replay(Recording const& recording) const;
    //! @}

    //! Waits for all that the stream was given. \throws Error kRuntimeInput: some of it failed.
    void synchronize() const;

    //! Records what `enqueue` gives to the stream, without doing it.
    //! \param enqueue returns false where it fails.
    //! \return null where that work, or this driver, cannot be recorded; nothing was done then either.
    template <typename Enqueue>
    std::shared_ptr<Recording const> record(Enqueue enqueue) const
    {
        if (!begin_recording())
        {
            return nullptr;
        }
        return end_recording(enqueue());
    }

private:
    bool begin_recording() const;
    std::shared_ptr<Recording const> end_recording(bool complete) const;
    //! Frees something in the context, where nobody could hear of a failure.
    template <typename Free>
    void quietly(Free free) const noexcept;

    struct Driver; // the functions of libcuda
    std::unique_ptr<Driver const> const mDriver;
    int mDevice = 0;
    void* mContext = nullptr;
    void* mStream = nullptr;
};

} // namespace edgeattn
