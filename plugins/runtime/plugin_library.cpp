#include "edgeattn/plugin_library.hpp"

#include "edgeattn/plugins.h"
#include "json_fields.h"
#include "mapped_file.h"

#include <string_view>

namespace edgeattn
{
namespace
{

std::string const kMarker = std::string("\0", 1) + "edgeattn-plugins-table ";
char const* const kTodo = "make one with edgeattn plugins build";

[[noreturn]] void no_library(std::string const& path, std::string const& came)
{
    throw Error(ErrorCode::kBundle, "edgeattn's plugin library at " + path, came, kTodo);
}

//! The processor a shared library is for (ELF specification, e_machine), empty where it is none.
std::string elf_processor(std::string_view content)
{
    if (content.size() < 20 || content.substr(0, 4) != "\x7f" "ELF")
    {
        return "";
    }
    int const machine = static_cast<unsigned char>(content[18]) | static_cast<unsigned char>(content[19]) << 8;
    return machine == 62 ? "x86_64" : machine == 183 ? "aarch64" : "";
}

//! What stands between the marker and the next zero byte.
std::string table_of(std::string_view content, std::string const& path)
{
    size_t const marker = content.find(kMarker);
    size_t const begin = marker + kMarker.size();
    size_t const end = marker == std::string_view::npos ? marker : content.find('\0', begin);
    if (end == std::string_view::npos)
    {
        no_library(path, "it holds no table of edgeattn's kernels");
    }
    return std::string(content.substr(begin, end - begin));
}

} // namespace

std::string processor()
{
#if defined(__aarch64__)
    return "aarch64";
#elif defined(__x86_64__)
    return "x86_64";
#else
#error "an engine's processor is named in its record: add this one to edgeattn/bundle"
#endif
}

std::optional<PluginLibrary> plugin_library(Bundle const& bundle, std::string const& arch)
{
    std::optional<std::string> const path = bundle.file("plugins/" + arch + "/libedgeattn_plugins.so");
    if (!path)
    {
        return std::nullopt;
    }
    MappedFile const file(*path);
    std::string_view const content(static_cast<char const*>(file.data()), file.bytes());
    std::string const made_for = elf_processor(content);
    if (made_for.empty())
    {
        no_library(*path, "it is no shared library for x86-64 or aarch64");
    }
    Json const table = parse_object(table_of(content, *path), *path, kTodo);
    Fields fields(table, {*path, "", kTodo});
    PluginLibrary library{*path, fields.integer("abi"), fields.string("arch"), {}};
    if (library.abi != EDGEATTN_PLUGIN_ABI)
    {
        throw Error(ErrorCode::kBundle, "a plugin library of ABI " + std::to_string(EDGEATTN_PLUGIN_ABI),
            *path + " is of ABI " + std::to_string(library.abi), "build it with this edgeattn: edgeattn plugins build");
    }
    for (Json const& op : fields.list("ops"))
    {
        library.ops.push_back(string_of(op, fields.at("ops")));
    }
    if (library.arch != made_for || made_for != arch)
    {
        no_library(*path, "it says " + library.arch + " and is for " + made_for);
    }
    return library;
}

} // namespace edgeattn
