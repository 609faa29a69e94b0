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
    EDGEATTN_LOWERING = 5      /* made for another GPU or processor */
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

/* Opens and checks a bundle; *bundle is set only on EDGEATTN_OK, and then is edgeattn_bundle_close's to free. */
EDGEATTN_C_API edgeattn_code edgeattn_bundle_open(char const* path, int check_hashes, edgeattn_bundle** bundle);

/* Canonical NAME@SOFTWARE the bundle was made for; valid until it is closed. */
EDGEATTN_C_API char const* edgeattn_bundle_target(edgeattn_bundle const* bundle);

/* Null is allowed. */
EDGEATTN_C_API void edgeattn_bundle_close(edgeattn_bundle* bundle);

/* Chooses a token from the fp32 logits of one position; index is that of the new token, counted from 0. */
EDGEATTN_C_API edgeattn_code edgeattn_pick(
    edgeattn_sampling const* sampling, float const* logits, size_t vocabulary, uint64_t index, int64_t* token);

#ifdef __cplusplus
}
#endif

#endif
