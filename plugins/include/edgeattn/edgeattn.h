/* libedgeattn for C and whatever calls C. No function throws; each that can fail returns a code. */
#ifndef EDGEATTN_EDGEATTN_H
#define EDGEATTN_EDGEATTN_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define EDGEATTN_C_API __attribute__((visibility("default")))
#else
#define EDGEATTN_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum edgeattn_code
{
    EDGEATTN_OK = 0,
    EDGEATTN_INTERNAL = 1,     /* a defect, or no memory */
    EDGEATTN_USAGE = 2,        /* a setting outside its range, or a null pointer */
    EDGEATTN_BUNDLE = 3,       /* missing, damaged, or made for something else */
    EDGEATTN_RUNTIME_INPUT = 4, /* a tensor that cannot be used */
    EDGEATTN_LOWERING = 5,     /* made for another GPU, processor or TensorRT, or TensorRT refuses it */
    EDGEATTN_MISSING = 6       /* no driver, no GPU, no TensorRT */
} edgeattn_code;

/* How the next token is chosen, see edgeattn/sampling.hpp. */
typedef struct edgeattn_sampling
{
    double temperature;
    int64_t top_k;
    double top_p;
    uint64_t seed;
} edgeattn_sampling;

typedef struct edgeattn_bundle edgeattn_bundle;

EDGEATTN_C_API char const* edgeattn_version(void);

/* What the last call of this thread that failed said: one sentence, valid until the next failure. */
EDGEATTN_C_API char const* edgeattn_last_error(void);

/* TensorRT's own last message in that failure, empty where it was not TensorRT that refused. */
EDGEATTN_C_API char const* edgeattn_last_tensorrt_message(void);

/* Opens and checks a bundle; *bundle is set only on EDGEATTN_OK, and then is edgeattn_bundle_close's to free. */
EDGEATTN_C_API edgeattn_code edgeattn_bundle_open(char const* path, int check_hashes, edgeattn_bundle** bundle);

/* Canonical NAME@SOFTWARE the bundle was made for; valid until it is closed. */
EDGEATTN_C_API char const* edgeattn_bundle_target(edgeattn_bundle const* bundle);

/* Null is allowed. */
EDGEATTN_C_API void edgeattn_bundle_close(edgeattn_bundle* bundle);

/* Chooses a token from the fp32 logits of one position; index is that of the new token, counted from 0. */
EDGEATTN_C_API edgeattn_code edgeattn_pick(
    edgeattn_sampling const* sampling, float const* logits, size_t vocabulary, uint64_t index, int64_t* token);

/* A loaded decoder, see edgeattn/session.hpp. For one thread at a time: a second one is refused. */
typedef struct edgeattn_session edgeattn_session;

typedef struct edgeattn_session_options
{
    char const* engine; /* its file; null for the bundle's newest that runs here */
    int64_t rows;       /* texts that run together */
    int cuda_graph;     /* whether to replay a step's work where its shapes stay the same */
} edgeattn_session_options;

/* options may be null: the newest engine, 1 row, with CUDA graphs. */
EDGEATTN_C_API edgeattn_code edgeattn_session_open(
    edgeattn_bundle const* bundle, edgeattn_session_options const* options, edgeattn_session** session);

/* Token ids lie below the vocabulary; a row has at most context tokens, of which length are used. 0 for null. */
EDGEATTN_C_API int64_t edgeattn_session_vocabulary(edgeattn_session const* session);
EDGEATTN_C_API int64_t edgeattn_session_context(edgeattn_session const* session);
EDGEATTN_C_API int64_t edgeattn_session_length(edgeattn_session const* session);

/* Runs new tokens [rows, length]; mask is 1 at tokens and 0 at padding on the right, or null. *logits becomes those of
   each row's last token, [rows, vocabulary], which stay until the next step. */
EDGEATTN_C_API edgeattn_code edgeattn_session_step(edgeattn_session* session, int64_t const* tokens, int64_t length,
    int64_t const* mask, float const** logits);

/* Forgets all tokens. */
EDGEATTN_C_API edgeattn_code edgeattn_session_reset(edgeattn_session* session);

/* Null is allowed. */
EDGEATTN_C_API void edgeattn_session_close(edgeattn_session* session);

typedef enum edgeattn_finish_reason
{
    EDGEATTN_FINISH_STOP = 0,       /* a stop token */
    EDGEATTN_FINISH_LENGTH = 1,     /* as many as asked for */
    EDGEATTN_FINISH_CONTEXT = 2,    /* no room left */
    EDGEATTN_FINISH_INTERRUPTED = 3 /* the callback said so */
} edgeattn_finish_reason;

typedef struct edgeattn_generator_options
{
    int64_t max_new_tokens;
    edgeattn_sampling sampling;
    int64_t const* stop_tokens; /* besides the checkpoint's own; null without */
    size_t stop_token_count;
} edgeattn_generator_options;

/* Called with each token as it is chosen; 0 ends the text. */
typedef int (*edgeattn_on_token)(int64_t token, void* user);

/* Continues a prompt with a session of 1 row, which is reset first. reason may be null. */
EDGEATTN_C_API edgeattn_code edgeattn_generate(edgeattn_session* session, int64_t const* prompt, size_t prompt_tokens,
    edgeattn_generator_options const* options, edgeattn_on_token on_token, void* user, edgeattn_finish_reason* reason);

/* A loaded encoder, see edgeattn/encoder_session.hpp. For one thread at a time. */
typedef struct edgeattn_encoder edgeattn_encoder;

/* engine may be null. */
EDGEATTN_C_API edgeattn_code edgeattn_encoder_open(
    edgeattn_bundle const* bundle, char const* engine, edgeattn_encoder** encoder);

/* What an encoder gives; it stays until its next run. */
typedef struct edgeattn_encoding
{
    float const* data;
    int64_t shape[8];
    int32_t rank;
} edgeattn_encoding;

/* Runs tokens [rows, length]; mask and types may be null. */
EDGEATTN_C_API edgeattn_code edgeattn_encoder_run(edgeattn_encoder* encoder, int64_t const* tokens, int64_t rows,
    int64_t length, int64_t const* mask, int64_t const* types, edgeattn_encoding* encoding);

/* Runs images [rows, channels, height, width], scaled and normalised as the model was trained. */
EDGEATTN_C_API edgeattn_code edgeattn_encoder_run_images(
    edgeattn_encoder* encoder, float const* pixels, int64_t rows, edgeattn_encoding* encoding);

/* Null is allowed. */
EDGEATTN_C_API void edgeattn_encoder_close(edgeattn_encoder* encoder);

#ifdef __cplusplus
}
#endif

#endif
