#include "edgeattn/edgeattn.h"

#include "edgeattn/encoder_session.hpp"
#include "edgeattn/generator.hpp"

#include <algorithm>
#include <exception>
#include <iterator>
#include <string>

struct edgeattn_bundle
{
    edgeattn::Bundle bundle;
};

struct edgeattn_session
{
    edgeattn::Session session;
};

struct edgeattn_encoder
{
    edgeattn::EncoderSession session;
};

namespace
{

thread_local std::string gLastError;
thread_local std::string gLastTensorrtMessage;

edgeattn_code failed(edgeattn_code code, char const* sentence, char const* tensorrt = "") noexcept
{
    try
    {
        gLastError = sentence;
        gLastTensorrtMessage = tensorrt;
    }
    catch (...)
    {
        gLastError.clear(); // no memory for the sentence: the code alone has to do
        gLastTensorrtMessage.clear();
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
        return failed(static_cast<edgeattn_code>(error.code()), error.what(), error.tensorrt());
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

edgeattn::Sampling sampling_of(edgeattn_sampling const& sampling)
{
    return {sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed};
}

edgeattn_encoding encoding_of(edgeattn::Encoding const& encoding)
{
    edgeattn_encoding found{encoding.data, {}, static_cast<int32_t>(encoding.shape.size())};
    std::copy(encoding.shape.begin(), encoding.shape.end(), std::begin(found.shape));
    return found;
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

char const* edgeattn_last_tensorrt_message(void)
{
    return gLastTensorrtMessage.c_str();
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
        *token = sampling_of(*sampling).pick(logits, vocabulary, index);
    });
}

edgeattn_code edgeattn_session_open(
    edgeattn_bundle const* bundle, edgeattn_session_options const* options, edgeattn_session** session)
{
    return guarded(bundle && session, [&] {
        edgeattn::SessionOptions chosen;
        if (options)
        {
            chosen = {options->engine ? options->engine : "", options->rows, options->cuda_graph != 0};
        }
        *session = new edgeattn_session{edgeattn::Session::open(bundle->bundle, chosen)};
    });
}

int64_t edgeattn_session_vocabulary(edgeattn_session const* session)
{
    return session ? session->session.vocabulary() : 0;
}

int64_t edgeattn_session_context(edgeattn_session const* session)
{
    return session ? session->session.context() : 0;
}

int64_t edgeattn_session_length(edgeattn_session const* session)
{
    return session ? session->session.length() : 0;
}

edgeattn_code edgeattn_session_step(edgeattn_session* session, int64_t const* tokens, int64_t length,
    int64_t const* mask, float const** logits)
{
    return guarded(session && tokens && logits,
        [&] { *logits = session->session.step(tokens, length, mask).data; });
}

edgeattn_code edgeattn_session_reset(edgeattn_session* session)
{
    return guarded(session, [&] { session->session.reset(); });
}

void edgeattn_session_close(edgeattn_session* session)
{
    delete session;
}

edgeattn_code edgeattn_generate(edgeattn_session* session, int64_t const* prompt, size_t prompt_tokens,
    edgeattn_generator_options const* options, edgeattn_on_token on_token, void* user, edgeattn_finish_reason* reason)
{
    bool const complete = session && prompt && options && on_token
        && (options->stop_tokens || options->stop_token_count == 0);
    return guarded(complete, [&] {
        edgeattn::GeneratorOptions chosen;
        chosen.max_new_tokens = options->max_new_tokens;
        chosen.sampling = sampling_of(options->sampling);
        chosen.stop_tokens.assign(options->stop_tokens, options->stop_tokens + options->stop_token_count);
        auto const found = edgeattn::Generator(session->session)
                               .generate({prompt, prompt + prompt_tokens}, chosen,
                                   [&](int64_t token) { return on_token(token, user) != 0; });
        if (reason)
        {
            *reason = static_cast<edgeattn_finish_reason>(found.finish_reason);
        }
    });
}

edgeattn_code edgeattn_encoder_open(edgeattn_bundle const* bundle, char const* engine, edgeattn_encoder** encoder)
{
    return guarded(bundle && encoder, [&] {
        *encoder = new edgeattn_encoder{edgeattn::EncoderSession::open(bundle->bundle, engine ? engine : "")};
    });
}

edgeattn_code edgeattn_encoder_run(edgeattn_encoder* encoder, int64_t const* tokens, int64_t rows, int64_t length,
    int64_t const* mask, int64_t const* types, edgeattn_encoding* encoding)
{
    return guarded(encoder && tokens && encoding,
        [&] { *encoding = encoding_of(encoder->session.run(tokens, rows, length, mask, types)); });
}

edgeattn_code edgeattn_encoder_run_images(
    edgeattn_encoder* encoder, float const* pixels, int64_t rows, edgeattn_encoding* encoding)
{
    return guarded(encoder && pixels && encoding,
        [&] { *encoding = encoding_of(encoder->session.run_images(pixels, rows)); });
}

void edgeattn_encoder_close(edgeattn_encoder* encoder)
{
    delete encoder;
}
