#include "facts.h"

#include "json_fields.h"

#include <fstream>
#include <iterator>

namespace edgeattn
{
namespace
{

char const* const kAgain = "export the bundle again";
char const* const kEncoder = "encoder";

bool is_encoder(Json const& shape)
{
    auto const kind = shape.find("kind");
    return kind != shape.end() && *kind == kEncoder;
}

void require_kind(Bundle const& bundle, Json const& shape, bool encoder)
{
    if (is_encoder(shape) != encoder)
    {
        throw Error(ErrorCode::kBundle, (encoder ? "an encoder in " : "a decoder in ") + bundle.path,
            encoder ? "it is a decoder" : "it is an encoder, which generates no tokens",
            encoder ? "use edgeattn::Session" : "use edgeattn::EncoderSession");
    }
}

//! A number that counts something.
int64_t positive(Fields& fields, std::string const& name)
{
    int64_t const value = fields.integer(name);
    return value >= 1 ? value : (fields.at(name).refuse("it is below 1"), 0);
}

//! The most tokens that were asked for at export, else those of the model.
int64_t context_of(Fields& lowering, int64_t otherwise)
{
    return lowering.has("context") && lowering.get("context").is_number_integer() ? positive(lowering, "context")
                                                                                  : otherwise;
}

Json object_in(Bundle const& bundle, std::string const& name)
{
    std::optional<std::string> const path = bundle.file(name);
    if (!path)
    {
        return Json::object();
    }
    std::ifstream file(*path, std::ios::binary);
    return parse_object({std::istreambuf_iterator<char>(file), {}}, *path, kAgain);
}

std::vector<int64_t> stop_tokens(Bundle const& bundle, int64_t vocabulary)
{
    std::vector<int64_t> ids;
    for (char const* name : {"generation_config.json", "config.json"})
    {
        Json const found = object_in(bundle, name).value("eos_token_id", Json());
        if (found.is_null())
        {
            continue;
        }
        for (Json const& id : found.is_array() ? found : Json::array({found}))
        {
            if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocabulary))
            {
                throw Error(ErrorCode::kBundle,
                    std::string("eos_token_id in ") + name + " to be ids below " + std::to_string(vocabulary),
                    "it is " + found.dump(), "correct the checkpoint's file and export again");
            }
            ids.push_back(id.get<int64_t>());
        }
        return ids;
    }
    return ids;
}

} // namespace

DecoderFacts decoder_facts(Bundle const& bundle)
{
    Json const shape = Json::parse(bundle.manifest.shape), lowering = Json::parse(bundle.manifest.lowering);
    require_kind(bundle, shape, false);
    std::string const where = bundle.path + "/manifest.json";
    Fields model(shape, {where, "shape", kAgain}), lowered(lowering, {where, "lowering", kAgain});
    int64_t const vocabulary = positive(model, "vocab_size");
    return {vocabulary, context_of(lowered, positive(model, "max_context")),
        lowered.has("logits") && lowered.get("logits") == "last", stop_tokens(bundle, vocabulary)};
}

EncoderFacts encoder_facts(Bundle const& bundle)
{
    Json const shape = Json::parse(bundle.manifest.shape), lowering = Json::parse(bundle.manifest.lowering);
    require_kind(bundle, shape, true);
    std::string const where = bundle.path + "/manifest.json";
    Fields model(shape, {where, "shape", kAgain}), lowered(lowering, {where, "lowering", kAgain});
    Fields input(model.members("input"), model.at("input"));
    EncoderFacts facts;
    if (input.has("patch"))
    {
        facts.image_size = {positive(input, "channels"), positive(input, "height"), positive(input, "width")};
        return facts;
    }
    facts.vocabulary = positive(input, "vocab_size");
    facts.token_types = input.integer("token_types");
    facts.context = context_of(lowered, positive(input, "max_positions"));
    return facts;
}

} // namespace edgeattn
