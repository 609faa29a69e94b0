//! A prompt in, tokens out as they are chosen; as edgeattn/runtime/generate.py, and the same tokens.
#pragma once

#include "edgeattn/sampling.hpp"
#include "edgeattn/session.hpp"

#include <functional>
#include <vector>

namespace edgeattn
{

//! Why no more tokens came.
enum class FinishReason
{
    kStop,        //!< a stop token
    kLength,      //!< as many as asked for
    kContext,     //!< no room left
    kInterrupted, //!< the callback said so
};

struct GeneratorOptions
{
    int64_t max_new_tokens = 128;
    Sampling sampling;
    std::vector<int64_t> stop_tokens; //!< besides the checkpoint's own
};

//! What was generated.
struct Generation
{
    std::vector<int64_t> tokens; //!< without the one that ended it
    FinishReason finish_reason = FinishReason::kLength;
    double prefill_seconds = 0; //!< for reading the prompt and choosing the first token
    int64_t decode_steps = 0;   //!< tokens chosen after that
    double decode_seconds = 0;  //!< for running the model and choosing them
};

//! Called with each token; false ends the text.
using OnToken = std::function<bool(int64_t token)>;

//! Continues prompts with a session of one row, which it resets for each.
class EDGEATTN_API Generator
{
public:
    //! \param session must outlive the generator.
    //! \throws Error kUsage: it has several rows.
    explicit Generator(Session& session);

    //! \param prompt token ids, at least one.
    //! \throws Error kRuntimeInput: an empty prompt, one too long for the context, or ids out of range; kUsage: a
    //! number outside its range; else as `Session::step`.
    Generation generate(std::vector<int64_t> const& prompt, GeneratorOptions const& options = {},
        OnToken const& on_token = {});

private:
    Session& mSession;
};

} // namespace edgeattn
