//! A decoder's bundle that is loaded and runs on this machine's GPU; as edgeattn/runtime/session.py.
#pragma once

#include "edgeattn/bundle.hpp"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace edgeattn
{

struct SessionOptions
{
    std::string engine;     //!< its file; empty for the bundle's newest that runs here
    int64_t rows = 1;       //!< texts that run together
    bool cuda_graph = true; //!< replay a step's work where its shapes stay the same
};

//! Logits of one step, `[rows, positions, vocabulary]`; they stay until the session's next step.
struct Logits
{
    float const* data = nullptr;
    int64_t rows = 0;
    int64_t positions = 0;
    int64_t vocabulary = 0;
};

//! Which positions' logits a step returns.
enum class Positions
{
    kLast, //!< of each row's last token: `[rows, 1, vocabulary]`
    kAll,  //!< of all tokens that were given; a bundle exported with --logits last has no others than the last
};

//! A loaded engine with its KV cache and states, which every step continues. All memory of the GPU is allocated when it
//! is opened. For one thread at a time: a second one is refused.
class EDGEATTN_API Session
{
public:
    //! \throws Error kBundle: no bundle or no engine, a damaged one, or one of another graph; kLowering: made for
    //! another GPU, processor or TensorRT, more rows than it was built for, or TensorRT does not load it; kMissing: no
    //! GPU, no TensorRT, or no adapter for it; kRuntimeInput: the GPU's memory does not suffice.
    static Session open(Bundle const& bundle, SessionOptions const& options = {});

    //! Opens the bundle, too, and checks all its hashes.
    static Session open(std::string const& bundle, SessionOptions const& options = {});

    Session(Session&& other) noexcept;
    Session& operator=(Session&& other) noexcept;
    ~Session();

    int64_t rows() const;
    int64_t vocabulary() const;                         //!< token ids lie below this
    int64_t context() const;                            //!< most tokens of a row, prompt and continuation together
    int64_t length() const;                             //!< slots of the cache in use, padding included
    std::vector<int64_t> const& stop_tokens() const;    //!< ids that end a text, of the checkpoint
    size_t device_bytes() const;                        //!< the session's own memory on the GPU; TensorRT has its own
    bool replays() const;                               //!< whether the last step was replayed as a CUDA graph

    //! Runs the model on new tokens.
    //! \param tokens `[rows, length]`.
    //! \param mask `[rows, length]`, 1 at tokens and 0 at padding, which must be on the right; null when there is none.
    //! \throws Error kRuntimeInput: an id or mask that does not fit, more tokens than the context holds, logits that
    //! are not finite, or a failing GPU; kLowering: the engine was built for other sizes; kUsage: another thread is in
    //! a call. After a failing GPU the state is lost: call `reset`.
    Logits step(
        int64_t const* tokens, int64_t length, int64_t const* mask = nullptr, Positions positions = Positions::kLast);

    //! Forgets all tokens. \throws Error kRuntimeInput: the GPU fails; kUsage: another thread is in a call.
    void reset();

private:
    friend class Generator;

    //! Steps and resets of one caller, which no other call comes between. \throws Error kUsage: one is in a call.
    class Turns
    {
    public:
        virtual Logits step(int64_t const* tokens, int64_t length) = 0;
        virtual void reset() = 0;

    protected:
        ~Turns() = default;
    };

    void alone(std::function<void(Turns&)> const& work);

    class Impl;
    explicit Session(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> mImpl;
};

} // namespace edgeattn
