#include "edgeattn/engine.hpp"

#include "edgeattn/plugins.h"
#include "json_fields.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace edgeattn
{
namespace
{

namespace fs = std::filesystem;

char const* const kModel = "model.onnx";
char const* const kEngines = "engines";
char const* const kBuildAgain = "build the engine again with edgeattn build --force";

std::optional<PluginRecord> plugin_record(Json const& value, Place const& place)
{
    if (value.is_null())
    {
        return std::nullopt;
    }
    Fields fields(value, place);
    return PluginRecord{fields.integer("abi"), fields.string("file"), fields.string("sha256")};
}

EngineRecord engine_record(std::string const& text, std::string const& where)
{
    Json const value = parse_object(text, where, kBuildAgain);
    Fields fields(value, {where, "", kBuildAgain});
    EngineRecord record;
    int64_t const bytes = fields.integer("bytes");
    record.bytes = bytes < 0 ? (fields.at("bytes").refuse("it is below 0"), 0) : static_cast<uint64_t>(bytes);
    record.sha256 = fields.string("sha256");
    record.model_sha256 = fields.string("model_sha256");
    record.flavour = fields.one_of("flavour", {"tensorrt", "tensorrt-rtx"});
    record.tensorrt = fields.string("tensorrt");
    for (Json const& sm : fields.list("sms"))
    {
        record.sms.push_back(integer_of(sm, fields.at("sms")));
    }
    record.arch = fields.string("arch");
    record.plugins = plugin_record(fields.get("plugins"), fields.at("plugins"));
    record.stripped = fields.boolean("stripped");
    return record;
}

void require_sound(Engine const& engine, Bundle const& bundle, std::string const& name)
{
    EngineRecord const& record = engine.record;
    std::error_code error; // what cannot be asked is not there
    std::string came;
    if (!fs::is_regular_file(engine.path, error))
    {
        came = "there is none";
    }
    else if (uint64_t const found = fs::file_size(engine.path, error); found != record.bytes)
    {
        came = "it has " + std::to_string(found);
    }
    else if (hash_file(engine.path) != record.sha256)
    {
        came = "its content was changed";
    }
    if (!came.empty())
    {
        throw Error(ErrorCode::kBundle,
            "the engine " + name + " of " + std::to_string(record.bytes) + " bytes, as its record says", came,
            "copy it again, or build it again with edgeattn build --force");
    }
    auto const model = bundle.manifest.files.find(kModel);
    if (model == bundle.manifest.files.end() || model->second.sha256 != record.model_sha256)
    {
        throw Error(ErrorCode::kBundle, name + " to be built from the bundle's own graph",
            "the graph is another one: the bundle was exported again", kBuildAgain);
    }
}

[[noreturn]] void elsewhere(std::string const& here, std::string const& name, std::string const& came)
{
    throw Error(ErrorCode::kLowering, "an engine for " + here + ", which is what this machine has",
        name + " does not fit: " + came, "build one here with edgeattn build");
}

std::string numbers(std::vector<int64_t> const& sms)
{
    std::string text;
    for (int64_t sm : sms)
    {
        text += (text.empty() ? "" : " or ") + std::to_string(sm);
    }
    return text;
}

void require_plugins(PluginRecord const& needed, Bundle const& bundle, std::string const& name)
{
    if (needed.abi != EDGEATTN_PLUGIN_ABI)
    {
        throw Error(ErrorCode::kBundle, "an engine with plugins of ABI " + std::to_string(EDGEATTN_PLUGIN_ABI),
            name + " has them of ABI " + std::to_string(needed.abi),
            "export the bundle again with this edgeattn, and build it again");
    }
    // Only what the manifest lists was checked when the bundle was opened, links and paths included.
    auto const listed = bundle.manifest.files.find(needed.file);
    bool const same = listed != bundle.manifest.files.end() && listed->second.sha256 == needed.sha256
        && hash_file(*bundle.file(needed.file)) == needed.sha256; // whatever of the bundle was checked before
    if (!same)
    {
        throw Error(ErrorCode::kBundle, "the plugin library that " + name + " was built with",
            needed.file + " is another one", kBuildAgain);
    }
}

} // namespace

Engine read_engine(std::string const& path)
{
    std::string const where = path + ".json";
    std::error_code error; // what cannot be asked is not there
    std::ifstream file(where, std::ios::binary);
    if (!fs::is_regular_file(where, error) || !file)
    {
        throw Error(ErrorCode::kBundle, "an engine that edgeattn build made, with its record " + where,
            "there is no such file",
            "name a file in the bundle's folder engines, or build one with edgeattn build");
    }
    return {path, engine_record({std::istreambuf_iterator<char>(file), {}}, where)};
}

std::vector<Engine> read_engines(Bundle const& bundle)
{
    std::string const suffix = ".engine.json";
    std::vector<std::pair<fs::file_time_type, std::string>> found;
    std::error_code error; // what cannot be asked is not there
    fs::directory_iterator const end;
    for (fs::directory_iterator entry(fs::path(bundle.path) / kEngines, error); !error && entry != end;
         entry.increment(error))
    {
        std::string const name = entry->path().string();
        if (name.size() > suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0)
        {
            found.emplace_back(fs::last_write_time(entry->path(), error), name);
        }
    }
    std::sort(found.begin(), found.end(), [](auto const& a, auto const& b) { return a.first > b.first; });
    std::vector<Engine> engines;
    for (auto const& [time, name] : found)
    {
        engines.push_back(read_engine(name.substr(0, name.size() - std::string(".json").size())));
    }
    return engines;
}

std::vector<Engine> engines_for(Bundle const& bundle, int64_t sm, std::string const& arch, std::string const& named)
{
    std::vector<Engine> const engines
        = named.empty() ? read_engines(bundle) : std::vector<Engine>{read_engine(named)};
    std::vector<Engine> fitting;
    std::optional<Error> newest;
    for (Engine const& engine : engines)
    {
        try
        {
            require_runs_here(engine, bundle, sm, arch);
            fitting.push_back(engine);
        }
        catch (Error const& refusal)
        {
            newest = newest ? newest : refusal;
        }
    }
    if (!fitting.empty())
    {
        return fitting;
    }
    throw newest ? *newest
                 : Error(ErrorCode::kBundle, "an engine in " + (fs::path(bundle.path) / kEngines).string(),
                     "there is none", "build one with edgeattn build " + bundle.path);
}

void require_runs_here(Engine const& engine, Bundle const& bundle, int64_t sm, std::string const& arch)
{
    EngineRecord const& record = engine.record;
    std::string const name = fs::path(engine.path).filename().string();
    require_sound(engine, bundle, name);
    if (std::find(record.sms.begin(), record.sms.end(), sm) == record.sms.end())
    {
        elsewhere("SM " + std::to_string(sm), name, "it was built for SM " + numbers(record.sms));
    }
    if (record.arch != arch)
    {
        elsewhere(arch, name, "it was built on " + record.arch);
    }
    if (record.plugins)
    {
        require_plugins(*record.plugins, bundle, name);
    }
}

} // namespace edgeattn
