//! Opening a bundle: layout, manifest, hashes. The rules are those of edgeattn/bundle/{bundle,manifest}.py.
#pragma once

#include "edgeattn/error.hpp"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace edgeattn
{

//! A file of the bundle.
struct FileRecord
{
    uint64_t bytes = 0; //!< its size
    std::string sha256; //!< of its content
};

//! The tuple a bundle was made for.
struct TargetRecord
{
    std::string name;                            //!< canonical NAME@SOFTWARE
    std::string flavour;                         //!< "onnxruntime", "tensorrt" or "tensorrt-rtx"
    std::optional<int64_t> sm;                   //!< compute capability as 87, none for a CPU
    std::optional<std::string> software_version; //!< version of TensorRT or ONNX Runtime
};

//! Whether and how the bundle was proven when it was written.
struct VerificationRecord
{
    std::string status;                //!< "passed" or "skipped"
    std::vector<std::string> backends; //!< implementations that were compared
    std::string tensorrt;              //!< "built", "not checked" or "not applicable"
};

//! manifest.json: what a bundle is, what it was made from, and the hash of each file.
struct Manifest
{
    int64_t schema_version = 0;               //!< a newer one is refused
    std::map<std::string, std::string> tools; //!< versions of what wrote the bundle
    std::string source;                       //!< identity of the checkpoint, JSON
    std::string recipe;                       //!< what was asked for, JSON
    std::string lowering;                     //!< what was decided, JSON
    std::string shape;                        //!< architecture of the model, JSON
    TargetRecord target;
    std::optional<int64_t> plugin_abi; //!< ABI number of the plugin library, none without one
    VerificationRecord verification;
    std::optional<std::string> quality;      //!< perplexity, KL and agreement on a text, JSON
    std::map<std::string, FileRecord> files; //!< every file that must be there, by path inside the bundle
};

//! Reads manifest.json.
//! \param where named in errors.
//! \throws Error kBundle: no JSON, a newer schema, or fields that do not fit.
EDGEATTN_API Manifest parse_manifest(std::string const& text, std::string const& where);

//! A bundle on disk whose manifest was read and whose files were checked.
struct EDGEATTN_API Bundle
{
    std::string path; //!< its directory
    Manifest manifest;

    //! \param check_hashes read every file and compare with the manifest; sizes are always compared.
    //! \throws Error kBundle: nothing is there, or a file is missing, changed, or leads outside.
    static Bundle open(std::string const& path, bool check_hashes = true);

    //! The path of a file that the manifest lists, none when the bundle has no such file.
    std::optional<std::string> file(std::string const& name) const;
};

//! sha256 of a file, read in pieces.
//! \throws Error kBundle: it cannot be read.
EDGEATTN_API std::string hash_file(std::string const& path);

} // namespace edgeattn
