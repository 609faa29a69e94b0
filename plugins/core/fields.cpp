#include "core/fields.h"
#include "edgeattn/error.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace edgeattn
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

void FieldWriter::operator()(char const* name, int32_t const& value, bool)
{
    add(name, &value, PluginFieldType::kINT32, 1, std::to_string(value));
}

void FieldWriter::operator()(char const* name, float const& value, bool)
{
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%.9g", static_cast<double>(value));
    add(name, &value, PluginFieldType::kFLOAT32, 1, digits);
}

void FieldWriter::operator()(char const* name, std::string const& value, bool)
{
    add(name, value.data(), PluginFieldType::kCHAR, value.size(), value);
}

void FieldWriter::add(char const* name, void const* value, PluginFieldType type, size_t length, std::string const& word)
{
    fields.emplace_back(name, value, type, static_cast<int32_t>(length));
    text += std::string(" ") + name + "=" + word;
}

FieldReader::FieldReader(
    OpInfo const& op, nvinfer1::PluginFieldCollection const& given, std::vector<PluginField> const& known)
    : mOp(op)
    , mGiven(given)
{
    for (int32_t i = 0; i < given.nbFields; ++i)
    {
        char const* const name = given.fields[i].name;
        auto const isIt = [&](PluginField const& field) { return std::strcmp(field.name, name) == 0; };
        if (std::none_of(known.begin(), known.end(), isIt))
        {
            throw Error(
                std::string("attributes of ") + op.name, std::string("'") + name + "' came", "export the model again");
        }
    }
}

void FieldReader::operator()(char const* name, int32_t& value, bool required)
{
    if (auto const* const field = find(name, required, PluginFieldType::kINT32))
    {
        std::memcpy(&value, field->data, sizeof(value));
    }
}

void FieldReader::operator()(char const* name, float& value, bool required)
{
    if (auto const* const field = find(name, required, PluginFieldType::kFLOAT32))
    {
        std::memcpy(&value, field->data, sizeof(value));
    }
}

void FieldReader::operator()(char const* name, std::string& value, bool required)
{
    if (auto const* const field = find(name, required, PluginFieldType::kCHAR))
    {
        value.assign(static_cast<char const*>(field->data), static_cast<size_t>(field->length));
    }
}

PluginField const* FieldReader::find(char const* name, bool required, PluginFieldType type) const
{
    std::string const expected = std::string("attribute ") + name + " of " + mOp.name;
    for (int32_t i = 0; i < mGiven.nbFields; ++i)
    {
        PluginField const& field = mGiven.fields[i];
        if (std::strcmp(field.name, name) != 0 || field.data == nullptr)
        {
            continue;
        }
        if (field.type != type || (type != PluginFieldType::kCHAR && field.length != 1))
        {
            throw Error(expected, "it is of another type", "export the model again");
        }
        return &field;
    }
    if (required)
    {
        throw Error(expected, "the node has none", "export the model again");
    }
    return nullptr;
}

} // namespace edgeattn
