//! What libedgeattn_plugins.so exports besides what TensorRT asks of a plugin library.
#pragma once

#include <stdint.h>

//! Rises with every change after which an engine or a model made for an older library must not meet
//! this one: of an operator's tensors or attributes, of the functions below, of the table's fields.
#define EDGEATTN_PLUGIN_ABI 1

//! The library hides everything else.
#define EDGEATTN_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C"
{
#endif

//! EDGEATTN_PLUGIN_ABI of the library.
EDGEATTN_EXPORT int32_t edgeattnAbiVersion(void);

//! What the library holds, as JSON: {"abi", "arch", "tensorrt_headers", "triton", "kernels_sha256", "ops": [names],
//! "variants": [{"kernel", "dtype", "constants", "sm"}]}. The same text stands in the file, behind
//! "\0edgeattn-plugins-table " and up to the next zero byte, for readers that cannot load it.
EDGEATTN_EXPORT char const* edgeattnVariantTable(void);

#ifdef __cplusplus
}
#endif
