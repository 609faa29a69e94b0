#include "edgeattn/bundle.hpp"

#include "sha256.h"

#include <filesystem>
#include <fstream>
#include <iterator>

namespace edgeattn
{
namespace
{

namespace fs = std::filesystem;

char const* const kManifest = "manifest.json";
char const* const kModel = "model.onnx";
constexpr size_t kChunk = size_t{1} << 20;

[[noreturn]] void refuse(std::string const& expected, std::string const& came, std::string const& todo)
{
    throw Error(ErrorCode::kBundle, expected, came, todo);
}

std::ifstream opened(fs::path const& path)
{
    std::ifstream file(path, std::ios::binary);
    if (!file)
    {
        refuse(path.string() + " to be readable", "the system does not open it",
            "check the bundle's permissions or copy it again");
    }
    return file;
}

void check_file(fs::path const& root, std::string const& name, FileRecord const& record, bool check_hash)
{
    fs::path file = root;
    for (fs::path const& part : fs::path(name))
    {
        file /= part;
        if (fs::is_symlink(file))
        {
            refuse(name + " to be a file of the bundle", "it is a link that leads elsewhere",
                "copy the bundle with its files, or export it again");
        }
    }
    if (!fs::is_regular_file(file))
    {
        refuse(name + ", which the manifest lists, in " + root.string(), "the file is missing",
            "copy the whole bundle again");
    }
    uint64_t const found = fs::file_size(file);
    if (found != record.bytes)
    {
        refuse(name + " of " + std::to_string(record.bytes) + " bytes, as the manifest says",
            "it has " + std::to_string(found), "copy the bundle again or export it anew");
    }
    if (check_hash && hash_file(file.string()) != record.sha256)
    {
        refuse(name + " with the sha256 of the manifest", "its content was changed",
            "copy the bundle again or export it anew");
    }
}

Bundle checked(std::string const& path, bool check_hashes)
{
    fs::path const root(path);
    fs::path const manifest_file = root / kManifest;
    if (!fs::is_regular_file(manifest_file))
    {
        refuse("a bundle at " + path,
            fs::exists(root) ? std::string("there is no ") + kManifest : std::string("nothing is there"),
            "pass a directory that `edgeattn export` wrote");
    }
    std::ifstream file = opened(manifest_file);
    std::string const text{std::istreambuf_iterator<char>(file), {}};
    Bundle bundle{path, parse_manifest(text, manifest_file.string())};
    for (auto const& [name, record] : bundle.manifest.files)
    {
        check_file(root, name, record, check_hashes);
    }
    if (bundle.manifest.files.count(kModel) == 0)
    {
        refuse(std::string(kModel) + " among the files that " + manifest_file.string() + " lists",
            "it is not, so nothing vouches for it", "export the bundle again");
    }
    return bundle;
}

} // namespace

Bundle Bundle::open(std::string const& path, bool check_hashes)
{
    try
    {
        return checked(path, check_hashes);
    }
    catch (fs::filesystem_error const& error)
    {
        refuse("files that can be read in " + path, "the system says: " + error.code().message(),
            "check the bundle's permissions or copy it again");
    }
}

std::optional<std::string> Bundle::file(std::string const& name) const
{
    return manifest.files.count(name) ? std::optional((fs::path(path) / name).string()) : std::nullopt;
}

std::string hash_file(std::string const& path)
{
    std::ifstream file = opened(path);
    Sha256 digest;
    std::vector<char> chunk(kChunk);
    while (file.read(chunk.data(), static_cast<std::streamsize>(chunk.size())), file.gcount() > 0)
    {
        digest.update(reinterpret_cast<unsigned char const*>(chunk.data()), static_cast<size_t>(file.gcount()));
    }
    if (file.bad())
    {
        refuse(path + " to be readable", "the system stops in the middle", "copy the bundle again");
    }
    return digest.hex();
}

} // namespace edgeattn
