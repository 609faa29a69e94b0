//! How operators come to TensorRT.
#pragma once

#include "core/fields.h"
#include "core/plugin.h"

#include <vector>

namespace edgeattn
{

//! Makes plugins of one operator; getCreators() gives TensorRT those of all operators with kernels.
class Creator : public nvinfer1::IPluginCreatorV3One
{
public:
    //! \param fields of any values.
    Creator(OpInfo const& op, std::vector<nvinfer1::PluginField> fields);

    nvinfer1::IPluginV3* createPlugin(
        char const* layer, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase) noexcept final;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept final;
    char const* getPluginName() const noexcept final;
    char const* getPluginVersion() const noexcept final;
    char const* getPluginNamespace() const noexcept final;

    OpInfo const& op() const noexcept
    {
        return mOp;
    }

    //! All creators are a list, for which static objects need no memory.
    Creator* next() const noexcept
    {
        return mNext;
    }

protected:
    std::vector<nvinfer1::PluginField> const& known() const noexcept
    {
        return mFields;
    }

private:
    virtual Plugin* create(nvinfer1::PluginFieldCollection const& fields) const = 0;

    OpInfo const& mOp;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
    Creator* mNext{nullptr};
};

//! A static object of this type is all it takes to add an operator.
template <typename PluginType>
class Registered final : public Creator
{
public:
    Registered()
        : Creator(Op::kINFO, written(Attributes{}).fields)
    {
    }

private:
    using Op = typename PluginType::OpType;
    using Attributes = typename PluginType::Attributes;

    Plugin* create(nvinfer1::PluginFieldCollection const& fields) const final
    {
        Attributes attributes;
        Attributes::visit(attributes, FieldReader(Op::kINFO, fields, known()));
        return new PluginType(attributes);
    }
};

} // namespace edgeattn
