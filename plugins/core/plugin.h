//! What all plugins have in common: everything TensorRT asks but an operator's own launches.
#pragma once

#include "core/fields.h"
#include "core/op_info.h"

#include <NvInferRuntime.h>
#include <string>
#include <vector>

namespace edgeattn
{

//! A plugin for an operator with a dossier. An operator derives from OpPlugin, below.
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime
{
public:
    //! \param attributes as text, for the key of TensorRT's timing cache.
    Plugin(OpInfo const& op, std::string const& attributes);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
    nvinfer1::IPluginV3* clone() noexcept final;

    char const* getPluginName() const noexcept final;
    char const* getPluginVersion() const noexcept final;
    char const* getPluginNamespace() const noexcept final;

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) noexcept final;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t nbOutputs, nvinfer1::DataType const* inputs,
        int32_t nbInputs) const noexcept final;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& builder) noexcept final;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t nbInputs,
        int32_t nbOutputs) noexcept final;
    int32_t getNbOutputs() const noexcept final;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept final;
    char const* getTimingCacheID() noexcept final;
    int32_t getAliasedInput(int32_t output) noexcept final;

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept final;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* outputs, int32_t nbOutputs) noexcept final;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDescs, nvinfer1::PluginTensorDesc const* outputDescs,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final;

private:
    // What OpPlugin passes on to the operator.
    virtual Plugin* copy() const = 0;
    virtual std::vector<nvinfer1::PluginField> fields() const = 0;
    virtual void checkSizes(Dtype dtype, Sizes const& sizes) const = 0;
    virtual size_t workspaceOf(Dtype dtype, Sizes const& largest) const = 0;
    virtual void loadFor(Dtype dtype, Sizes const& sizes) = 0;
    virtual void launchFor(Sizes const& sizes, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) const = 0;

    OpInfo const& mOp;
    std::string mTimingCacheId;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

//! A plugin in terms of an operator, `Op` of generated/<op>.h. The operator derives from it and says which sizes
//! it takes, what workspace it needs, which kernels it loads and how it launches them. Whatever it throws is logged and
//! becomes TensorRT's error code.
template <typename Derived, typename Op>
class OpPlugin : public Plugin
{
public:
    using OpType = Op;
    using Dims = typename Op::Dims;
    using Attributes = typename Op::Attributes;
    using Tensors = typename Op::Tensors;

    explicit OpPlugin(Attributes const& attributes)
        : Plugin(Op::kINFO, written(attributes).text)
        , mAttributes(attributes)
    {
    }

protected:
    //! Refuses what no kernel here can do. Called while building too, with smallest and largest sizes, for no device.
    virtual void check(Dtype dtype, Dims const& dims) const = 0;

    //! Bytes, which never fall when a size rises.
    virtual size_t workspaceSize(Dtype dtype, Dims const& largest) const = 0;

    //! Loads the kernels that `launch` needs for these sizes into the current context.
    virtual void load(Dtype dtype, Dims const& dims) = 0;

    //! Allocates, waits for and loads nothing, so that CUDA graphs can capture it.
    virtual void launch(Dims const& dims, Tensors const& tensors, void* workspace, cudaStream_t stream) const = 0;

    Attributes mAttributes;

private:
    Plugin* copy() const final
    {
        return new Derived(static_cast<Derived const&>(*this));
    }

    std::vector<nvinfer1::PluginField> fields() const final
    {
        return written(mAttributes).fields;
    }

    void checkSizes(Dtype dtype, Sizes const& sizes) const final
    {
        check(dtype, Dims::of(sizes));
    }

    size_t workspaceOf(Dtype dtype, Sizes const& largest) const final
    {
        return workspaceSize(dtype, Dims::of(largest));
    }

    void loadFor(Dtype dtype, Sizes const& sizes) final
    {
        load(dtype, Dims::of(sizes));
    }

    void launchFor(Sizes const& sizes, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) const final
    {
        launch(Dims::of(sizes), Tensors::of(inputs, outputs), workspace, stream);
    }
};

} // namespace edgeattn
