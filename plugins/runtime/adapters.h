//! Which library stands between the session and a TensorRT, and how it is opened.
#pragma once

#include "adapter.h"

#include <string>

namespace edgeattn
{

//! Loads an engine through the adapter for the TensorRT that built it.
//! \param flavour "tensorrt" or "tensorrt-rtx".
//! \throws Error kMissing: no adapter or no TensorRT; kLowering: another TensorRT, or it does not load the engine.
LoadedEngine* load_engine(std::string const& flavour, EngineRequest const& request);

} // namespace edgeattn
