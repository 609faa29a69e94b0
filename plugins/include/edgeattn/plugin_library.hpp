//! The plugin library of a bundle, judged by the table in its file: nothing is loaded. As edgeattn/engine/plugins.py.
#pragma once

#include "edgeattn/bundle.hpp"

#include <optional>
#include <string>
#include <vector>

namespace edgeattn
{

struct PluginLibrary
{
    std::string path;
    int64_t abi = 0;              //!< EDGEATTN_PLUGIN_ABI of the library
    std::string arch;             //!< processor it is for
    std::vector<std::string> ops; //!< operators for which it has a creator
};

//! "x86_64" or "aarch64", which this program runs on.
EDGEATTN_API std::string processor();

//! A bundle's plugin library for a processor, none where it has none.
//! \throws Error kBundle: it is none of edgeattn's, is of another ABI, or for another processor than its folder says.
EDGEATTN_API std::optional<PluginLibrary> plugin_library(Bundle const& bundle, std::string const& arch = processor());

} // namespace edgeattn
