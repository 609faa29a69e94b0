#include "edgeattn/bundle.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

namespace edgeattn
{
namespace
{

using Json = nlohmann::json;

constexpr uint64_t kSchemaVersion = 1;
constexpr int kDeepest = 200; // pydantic's reader stops there
char const* const kAgain = "export the bundle again";

//! What a field is read with: where it is, for errors.
struct Place
{
    std::string file;
    std::string field;

    Place inside(std::string const& name) const
    {
        return {file, field.empty() ? name : field + "." + name};
    }

    [[noreturn]] void refuse(std::string const& came) const
    {
        throw Error(ErrorCode::kBundle,
            "a valid field '" + (field.empty() ? "manifest" : field) + "' in " + file, came, kAgain);
    }
};

Json parsed(std::string const& text, std::string const& where)
{
    auto const refuse = [&] {
        throw Error(ErrorCode::kBundle, where + " to hold a JSON object", "it does not parse", kAgain);
    };
    auto const shallow = [&](int depth, Json::parse_event_t event, Json&) {
        bool const opens = event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
        if (opens && depth >= kDeepest)
        {
            refuse();
        }
        return true;
    };
    try
    {
        Json value = Json::parse(text, shallow);
        // The library skips a byte order mark, Python refuses it.
        if (value.is_object() && text.compare(0, 3, "\xEF\xBB\xBF") != 0)
        {
            return value;
        }
    }
    catch (Json::exception const&) // also a number beyond fp64
    {
    }
    refuse();
    return {};
}

std::string string_of(Json const& value, Place const& place)
{
    return value.is_string() ? value.get<std::string>() : (place.refuse("it is no string"), "");
}

int64_t integer_of(Json const& value, Place const& place)
{
    bool const fits = value.is_number_unsigned() ? value.get<uint64_t>() <= INT64_MAX : value.is_number_integer();
    return fits ? value.get<int64_t>() : (place.refuse("it is no integer of 64 bits"), 0);
}

//! An object whose fields are asked for by name; at the end none may be left.
class Fields
{
public:
    Fields(Json const& value, Place place)
        : mValue(value)
        , mPlace(std::move(place))
    {
        if (!value.is_object())
        {
            mPlace.refuse("it is no object");
        }
    }

    Json const& get(std::string const& name)
    {
        mKnown.insert(name);
        auto const found = mValue.find(name);
        return found != mValue.end() ? *found : (at(name).refuse("it is missing"), mValue);
    }

    Place at(std::string const& name) const
    {
        return mPlace.inside(name);
    }

    std::string string(std::string const& name)
    {
        return string_of(get(name), at(name));
    }

    std::string one_of(std::string const& name, std::set<std::string> const& allowed)
    {
        std::string value = string(name);
        return allowed.count(value) ? value : (at(name).refuse("'" + value + "' is unknown"), "");
    }

    int64_t integer(std::string const& name)
    {
        return integer_of(get(name), at(name));
    }

    std::optional<int64_t> optional_integer(std::string const& name)
    {
        return get(name).is_null() ? std::nullopt : std::optional(integer(name));
    }

    std::optional<std::string> optional_string(std::string const& name)
    {
        return get(name).is_null() ? std::nullopt : std::optional(string(name));
    }

    //! An object of anything.
    Json const& members(std::string const& name)
    {
        Json const& value = get(name);
        return value.is_object() ? value : (at(name).refuse("it is no object"), value);
    }

    //! The same as JSON text.
    std::string object(std::string const& name)
    {
        return members(name).dump();
    }

    bool has(std::string const& name) const
    {
        return mValue.contains(name);
    }

    void none_left() const
    {
        for (auto const& [name, value] : mValue.items())
        {
            if (mKnown.count(name) == 0)
            {
                at(name).refuse("it is unknown");
            }
        }
    }

private:
    Json const& mValue;
    Place mPlace;
    std::set<std::string> mKnown;
};

//! Refuses what is no relative path inside the bundle in canonical form.
void require_plain_path(std::string const& name, Place const& place)
{
    for (size_t start = 0; start <= name.size();)
    {
        size_t const end = std::min(name.find('/', start), name.size());
        std::string const part = name.substr(start, end - start);
        if (part.empty() || part == "." || part == "..")
        {
            place.refuse("'" + name + "' leads outside the bundle");
        }
        start = end + 1;
    }
    if (name.find_first_of(std::string("\\:\0", 3)) != std::string::npos)
    {
        place.refuse("'" + name + "' is no plain file name");
    }
}

FileRecord file_record(Json const& value, Place const& place)
{
    Fields fields(value, place);
    int64_t const bytes = fields.integer("bytes");
    if (bytes < 0)
    {
        fields.at("bytes").refuse("it is below 0");
    }
    FileRecord const record{static_cast<uint64_t>(bytes), fields.string("sha256")};
    auto const is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
    if (record.sha256.size() != 64 || !std::all_of(record.sha256.begin(), record.sha256.end(), is_digit))
    {
        fields.at("sha256").refuse("it is no sha256 of 64 lower-case digits");
    }
    fields.none_left();
    return record;
}

TargetRecord target_record(Json const& value, Place const& place)
{
    Fields fields(value, place);
    TargetRecord record;
    record.name = fields.string("name");
    record.flavour = fields.one_of("flavour", {"onnxruntime", "tensorrt", "tensorrt-rtx"});
    record.sm = fields.optional_integer("sm");
    record.software_version = fields.optional_string("software_version");
    fields.none_left();
    return record;
}

VerificationRecord verification_record(Json const& value, Place const& place)
{
    Fields fields(value, place);
    VerificationRecord record;
    record.status = fields.one_of("status", {"passed", "skipped"});
    Json const& backends = fields.get("backends");
    if (!backends.is_array())
    {
        fields.at("backends").refuse("it is no list");
    }
    for (Json const& backend : backends)
    {
        record.backends.push_back(string_of(backend, fields.at("backends")));
    }
    record.tensorrt = fields.one_of("tensorrt", {"built", "not checked", "not applicable"});
    fields.none_left();
    return record;
}

void require_known_schema(Json const& value, std::string const& where)
{
    auto const found = value.find("schema_version");
    // Unsigned is what is not negative; of more than 63 bits it would be, as a signed number.
    if (found != value.end() && found->is_number_unsigned() && found->get<uint64_t>() > kSchemaVersion)
    {
        throw Error(ErrorCode::kBundle, "a manifest of schema version " + std::to_string(kSchemaVersion) + " or older",
            where + " has version " + found->dump(), "upgrade edgeattn");
    }
}

} // namespace

Manifest parse_manifest(std::string const& text, std::string const& where)
{
    Json const value = parsed(text, where);
    require_known_schema(value, where);
    Fields fields(value, {where, ""});
    Manifest manifest;
    manifest.schema_version = fields.integer("schema_version");
    for (auto const& [name, version] : fields.members("tools").items())
    {
        manifest.tools[name] = string_of(version, fields.at("tools").inside(name));
    }
    manifest.source = fields.object("source");
    manifest.recipe = fields.object("recipe");
    manifest.lowering = fields.object("lowering");
    manifest.shape = fields.object("shape");
    manifest.target = target_record(fields.get("target"), fields.at("target"));
    manifest.plugin_abi = fields.optional_integer("plugin_abi");
    manifest.verification = verification_record(fields.get("verification"), fields.at("verification"));
    if (fields.has("quality") && !fields.get("quality").is_null())
    {
        manifest.quality = fields.object("quality");
    }
    for (auto const& [name, record] : fields.members("files").items())
    {
        Place const place = fields.at("files").inside(name);
        require_plain_path(name, place);
        manifest.files[name] = file_record(record, place);
    }
    fields.none_left();
    return manifest;
}

} // namespace edgeattn
