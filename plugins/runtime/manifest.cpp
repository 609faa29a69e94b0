#include "edgeattn/bundle.hpp"
#include "json_fields.h"

#include <algorithm>

namespace edgeattn
{
namespace
{

constexpr uint64_t kSchemaVersion = 1;
char const* const kAgain = "export the bundle again";

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
    for (Json const& backend : fields.list("backends"))
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
    Json const value = parse_object(text, where, kAgain);
    require_known_schema(value, where);
    Fields fields(value, {where, "", kAgain});
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
