/* edgeattn for other languages: no function throws, each returns a code and keeps its sentence. */
#ifndef EDGEATTN_EDGEATTN_H
#define EDGEATTN_EDGEATTN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C"
{
#endif

#if defined(__GNUC__)
#define EDGEATTN_C_API __attribute__((visibility("default")))
#else
#define EDGEATTN_C_API
#endif

typedef enum edgeattn_code
{
    EDGEATTN_OK = 0,
    EDGEATTN_USAGE = 1,
    EDGEATTN_INPUT = 2,
    EDGEATTN_INTERNAL = 3
} edgeattn_code;

/* As edgeattn::Sampling. */
typedef struct edgeattn_sampling
{
    double temperature;
    double top_p;
    uint64_t top_k;
    uint64_t seed;
} edgeattn_sampling;

/* Chooses a token from `vocabulary` logits into `token`; see edgeattn::Sampling::pick. */
EDGEATTN_C_API edgeattn_code edgeattn_pick(edgeattn_sampling const* sampling, float const* logits, size_t vocabulary,
    uint64_t index, int64_t* token);

/* What the last function of this thread refused, in a sentence; empty after none. Valid until its next call. */
EDGEATTN_C_API char const* edgeattn_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
