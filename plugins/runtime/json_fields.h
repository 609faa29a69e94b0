//! JSON of which every field is checked.
#pragma once

#include "edgeattn/error.hpp"

#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>

namespace edgeattn
{

using Json = nlohmann::json;

constexpr int kDeepest = 200; // nothing may stand in more lists and objects, as pydantic's reader has it

//! What a field is read with: where it is, for errors.
struct Place
{
    std::string file;
    std::string field;
    std::string todo;

    Place inside(std::string const& name) const
    {
        return {file, field.empty() ? name : field + "." + name, todo};
    }

    [[noreturn]] void refuse(std::string const& came) const
    {
        throw Error(ErrorCode::kBundle,
            "a valid field '" + (field.empty() ? "manifest" : field) + "' in " + file, came, todo);
    }
};

//! \throws Error kBundle: the text is no JSON object.
inline Json parse_object(std::string const& text, std::string const& where, std::string const& todo)
{
    auto const refuse = [&] {
        throw Error(ErrorCode::kBundle, where + " to hold a JSON object", "it does not parse", todo);
    };
    auto const shallow = [&](int depth, Json::parse_event_t, Json&) {
        if (depth > kDeepest)
        {
            refuse();
        }
        return true;
    };
    try
    {
        Json value = Json::parse(text, shallow);
        // The library skips a byte order mark and takes a zero byte for the end; Python refuses both.
        bool const plain = text.compare(0, 3, "\xEF\xBB\xBF") != 0 && text.find('\0') == std::string::npos;
        if (value.is_object() && plain)
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

inline std::string string_of(Json const& value, Place const& place)
{
    return value.is_string() ? value.get<std::string>() : (place.refuse("it is no string"), "");
}

inline int64_t integer_of(Json const& value, Place const& place)
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

    bool boolean(std::string const& name)
    {
        Json const& value = get(name);
        return value.is_boolean() ? value.get<bool>() : (at(name).refuse("it is neither true nor false"), false);
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

    Json const& list(std::string const& name)
    {
        Json const& value = get(name);
        return value.is_array() ? value : (at(name).refuse("it is no list"), value);
    }

    //! An object of anything as JSON text.
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

} // namespace edgeattn
