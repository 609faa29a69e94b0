//! The beginning of the library's table of variants: what only the compiler knows of it.
#pragma once

#include "edgeattn/plugins.h"

#include <NvInferVersion.h>
#include <string_view>

#define EDGEATTN_TEXT_OF(value) #value
#define EDGEATTN_TEXT(macro) EDGEATTN_TEXT_OF(macro)

#if defined(__x86_64__)
#define EDGEATTN_ARCH "x86_64"
#elif defined(__aarch64__)
#define EDGEATTN_ARCH "aarch64"
#else
#error "edgeattn's plugins are for x86-64 and aarch64"
#endif

#define EDGEATTN_TABLE_START                                                                                           \
    "{\"abi\": " EDGEATTN_TEXT(EDGEATTN_PLUGIN_ABI) ", \"arch\": \"" EDGEATTN_ARCH                                     \
    "\", \"tensorrt_headers\": \"" EDGEATTN_TEXT(NV_TENSORRT_MAJOR) "." EDGEATTN_TEXT(NV_TENSORRT_MINOR) "\", "

namespace edgeattn
{

// Defined in the registry.cpp that edgeattn.engine.embed_cubins writes.
extern char const kTABLE[];
extern char const* const kTABLE_JSON; //!< behind the marker

constexpr bool isSame(std::string_view a, std::string_view b)
{
    return a == b;
}

} // namespace edgeattn
