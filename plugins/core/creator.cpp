#include "core/creator.h"
#include "core/exports.h"
#include "core/log.h"
#include "core/registry.h"
#include "core/table.h"

#include <utility>

namespace edgeattn
{
namespace
{

Creator* gFirst = nullptr;

//! An operator without a kernel is not offered, so that its function body runs.
std::vector<nvinfer1::IPluginCreatorInterface*> usableCreators()
{
    std::vector<nvinfer1::IPluginCreatorInterface*> creators;
    for (Creator* creator = gFirst; creator != nullptr; creator = creator->next())
    {
        if (hasKernels(creator->op()))
        {
            creators.push_back(creator);
        }
    }
    return creators;
}

} // namespace

Creator::Creator(OpInfo const& op, std::vector<nvinfer1::PluginField> fields)
    : mOp(op)
    , mFields(std::move(fields))
    , mNext(gFirst)
{
    for (auto& field : mFields)
    {
        field.data = nullptr;
    }
    mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    gFirst = this;
}

nvinfer1::IPluginV3* Creator::createPlugin(
    char const*, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase) noexcept
{
    nvinfer1::IPluginV3* plugin = nullptr;
    guarded(mOp.name, "createPlugin",
        [&] { plugin = create(fields == nullptr ? nvinfer1::PluginFieldCollection{} : *fields); });
    return plugin;
}

nvinfer1::PluginFieldCollection const* Creator::getFieldNames() noexcept
{
    return &mFieldCollection;
}

char const* Creator::getPluginName() const noexcept
{
    return mOp.name;
}

char const* Creator::getPluginVersion() const noexcept
{
    return mOp.version;
}

char const* Creator::getPluginNamespace() const noexcept
{
    return mOp.pluginNamespace;
}

} // namespace edgeattn

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    nbCreators = 0;
    nvinfer1::IPluginCreatorInterface* const* first = nullptr;
    edgeattn::guarded("the library", "getCreators", [&] {
        static auto const creators = edgeattn::usableCreators();
        nbCreators = static_cast<int32_t>(creators.size());
        first = creators.data();
    });
    return first;
}

int32_t edgeattnAbiVersion(void)
{
    return EDGEATTN_PLUGIN_ABI;
}

char const* edgeattnVariantTable(void)
{
    return edgeattn::kTABLE_JSON;
}
