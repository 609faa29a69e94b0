//! An encoder's bundle that is loaded and runs on this machine's GPU; as edgeattn/runtime/encoder.py.
#pragma once

#include "edgeattn/session.hpp"

namespace edgeattn
{

//! What the task gives, fp32: token states `[rows, length, hidden]`, which mean nothing at padding, vectors
//! `[rows, hidden]` of length 1, or logits `[rows, labels]`. They stay until the session's next run.
struct Encoding
{
    float const* data = nullptr;
    std::vector<int64_t> shape;
};

//! A loaded engine. All memory of the GPU is allocated when it is opened. For one thread at a time.
class EDGEATTN_API EncoderSession
{
public:
    //! \param engine its file; empty for the bundle's newest that runs here.
    //! \throws Error as Session::open.
    static EncoderSession open(Bundle const& bundle, std::string const& engine = {});
    static EncoderSession open(std::string const& bundle, std::string const& engine = {});

    EncoderSession(EncoderSession&& other) noexcept;
    EncoderSession& operator=(EncoderSession&& other) noexcept;
    ~EncoderSession();

    int64_t vocabulary() const;                    //!< token ids lie below this; 0 for images
    std::vector<int64_t> const& image_size() const; //!< channels, height and width; empty for texts

    //! Runs the encoder on tokens.
    //! \param tokens `[rows, length]`.
    //! \param mask `[rows, length]`, 1 at tokens and 0 at padding, which must be on the right; null without padding.
    //! \param types `[rows, length]`, which of two texts a token belongs to; null for one text.
    //! \throws Error kRuntimeInput: an encoder of images, a type, id or mask that does not fit, outputs that
    //! are not finite, or a failing GPU;
    //! kLowering: the engine was built for other sizes; kUsage: another thread is in a call.
    Encoding run(int64_t const* tokens, int64_t rows, int64_t length, int64_t const* mask = nullptr,
        int64_t const* types = nullptr);

    //! Runs the encoder on images.
    //! \param pixels `[rows, channels, height, width]`, scaled and normalised as the model was trained.
    //! \throws Error kRuntimeInput: an encoder of texts, or pixels that are not finite; else as `run`.
    Encoding run_images(float const* pixels, int64_t rows);

private:
    class Impl;
    explicit EncoderSession(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> mImpl;
};

} // namespace edgeattn
