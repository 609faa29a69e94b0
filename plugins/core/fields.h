//! An operator's attributes and the fields in which TensorRT keeps them.
#pragma once

#include "core/op_info.h"

#include <NvInferRuntime.h>
#include <string>
#include <vector>

namespace edgeattn
{

//! From attributes, which must live as long as the fields.
class FieldWriter
{
public:
    void operator()(char const* name, int32_t const& value, bool required);
    void operator()(char const* name, float const& value, bool required);
    void operator()(char const* name, std::string const& value, bool required);

    std::vector<nvinfer1::PluginField> fields;
    std::string text; //!< the same as one line

private:
    void add(
        char const* name, void const* value, nvinfer1::PluginFieldType type, size_t length, std::string const& word);
};

//! To attributes; those without a field stay as they are.
class FieldReader
{
public:
    //! \param known the fields of the operator.
    //! \throws Error a field is none of them.
    FieldReader(OpInfo const& op, nvinfer1::PluginFieldCollection const& given,
        std::vector<nvinfer1::PluginField> const& known);

    //! \throws Error the field is of another type, or required and missing.
    void operator()(char const* name, int32_t& value, bool required);
    void operator()(char const* name, float& value, bool required);
    void operator()(char const* name, std::string& value, bool required);

private:
    nvinfer1::PluginField const* find(char const* name, bool required, nvinfer1::PluginFieldType type) const;

    OpInfo const& mOp;
    nvinfer1::PluginFieldCollection const& mGiven;
};

template <typename Attributes>
FieldWriter written(Attributes const& attributes)
{
    FieldWriter writer;
    Attributes::visit(attributes, writer);
    return writer;
}

} // namespace edgeattn
