//! An engine of a bundle and whether it runs on a machine. The rules are those of edgeattn/engine/record.py.
#pragma once

#include "edgeattn/bundle.hpp"

namespace edgeattn
{

//! The plugin library an engine needs.
struct PluginRecord
{
    int64_t abi = 0;    //!< EDGEATTN_PLUGIN_ABI of the library
    std::string file;   //!< path inside the bundle
    std::string sha256; //!< of the library
};

//! Of the JSON file beside an engine, what decides where it runs.
struct EngineRecord
{
    uint64_t bytes = 0;                  //!< size of the engine
    std::string sha256;                  //!< of its content
    std::string model_sha256;            //!< of the graph it was built from
    std::string flavour;                 //!< "tensorrt" or "tensorrt-rtx"
    std::string tensorrt;                //!< version that built it, which alone can load it
    std::vector<int64_t> sms;            //!< compute capabilities
    std::string arch;                    //!< processor of the machine that built it
    std::optional<PluginRecord> plugins; //!< none needs no library
    bool stripped = false;               //!< built without its weights
};

//! An engine of a bundle.
struct Engine
{
    std::string path;
    EngineRecord record;
};

//! Reads the record PATH.json beside an engine.
//! \throws Error kBundle: there is none, or it does not read.
EDGEATTN_API Engine read_engine(std::string const& path);

//! The engines that were built for a bundle, the newest first.
//! \throws Error kBundle: a record does not read.
EDGEATTN_API std::vector<Engine> read_engines(Bundle const& bundle);

//! The engines of a bundle that are for a machine, the newest first, or the one that is named. Which TensorRT there is
//! is not looked at.
//! \param named its path, empty for all.
//! \throws Error kBundle: there is none; else what is wrong with the newest, see require_runs_here.
EDGEATTN_API std::vector<Engine> engines_for(
    Bundle const& bundle, int64_t sm, std::string const& arch, std::string const& named = {});

//! Refuses an engine that is damaged, stale, or made for another place. TensorRT's version is not looked at.
//! \param bundle opened, so that its other files are sound.
//! \param sm compute capability of the GPU, as 87.
//! \param arch "x86_64" or "aarch64".
//! \throws Error kBundle: the engine was changed, belongs to another graph or needs another plugin library;
//! kLowering: it was made for another GPU or processor.
EDGEATTN_API void require_runs_here(Engine const& engine, Bundle const& bundle, int64_t sm, std::string const& arch);

} // namespace edgeattn
