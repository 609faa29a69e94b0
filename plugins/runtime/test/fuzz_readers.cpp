//! libFuzzer's target: any bytes as the manifest of a bundle and as the record of an engine.
#include "edgeattn/bundle.hpp"
#include "edgeattn/engine.hpp"
#include "facts.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <unistd.h>

namespace
{

namespace fs = std::filesystem;

void write(fs::path const& path, std::string const& content)
{
    std::ofstream(path, std::ios::binary) << content;
}

//! Where the bytes are laid: the files that the corpus's manifests list, and one that leads outside.
fs::path folder()
{
    fs::path const root = fs::temp_directory_path() / ("edgeattn-fuzz-" + std::to_string(getpid()));
    fs::create_directories(root / "golden");
    write(root / "model.onnx", "a graph");
    write(root / "golden" / "decoder.npz", "golden");
    if (!fs::exists(fs::symlink_status(root / "link")))
    {
        fs::create_symlink("model.onnx", root / "link");
    }
    return root;
}

//! A refusal is an edgeattn::Error; whatever else is thrown ends the process.
template <typename Read>
void reads(Read read)
{
    try
    {
        read();
    }
    catch (edgeattn::Error const&)
    {
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(unsigned char const* data, size_t size)
{
    static fs::path const root = folder();
    std::string const text(reinterpret_cast<char const*>(data), size);
    write(root / "manifest.json", text);
    write(root / "made.engine.json", text);
    reads([&] { edgeattn::parse_manifest(text, "manifest.json"); });
    reads([&] { edgeattn::decoder_facts(edgeattn::Bundle::open(root.string())); });
    reads([&] { edgeattn::encoder_facts(edgeattn::Bundle::open(root.string())); });
    reads([&] { edgeattn::read_engine((root / "made.engine").string()); });
    return 0;
}
