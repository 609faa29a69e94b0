//! The symbols by which IPluginRegistry::loadLibrary takes a library; the version script keeps the static C++ runtime's
//! own in.
#pragma once

#include "edgeattn/plugins.h"

#include <NvInferRuntime.h>
#include <cstdint>

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "edgeattn's plugins need the headers of TensorRT 10.3 or later: set EDGEATTN_TENSORRT_INCLUDE"
#endif

extern "C"
{
EDGEATTN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
EDGEATTN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
}
