#include "core/plugin.h"
#include "edgeattn/error.hpp"
#include "core/log.h"
#include "core/registry.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace edgeattn
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kSUCCESS = 0;
constexpr int32_t kFAILURE = 1;

int32_t codeOf(bool succeeded)
{
    return succeeded ? kSUCCESS : kFAILURE;
}

DataType typeOf(Dtype dtype)
{
    switch (dtype)
    {
    case Dtype::kFP32: return DataType::kFLOAT;
    case Dtype::kFP16: return DataType::kHALF;
    case Dtype::kBF16: return DataType::kBF16;
    case Dtype::kINT32: return DataType::kINT32;
    case Dtype::kINT8: return DataType::kINT8;
    case Dtype::kBOOL: return DataType::kBOOL;
    }
    throw Error("a dtype of the dossiers", "there is another", "add it to typeOf");
}

//! The first of the operator's tensors, inputs before outputs, of a type variable.
int32_t firstOf(OpInfo const& op, char const* variable)
{
    int32_t position = 0;
    for (auto const& tensors : {op.inputs, op.outputs})
    {
        for (auto const& tensor : tensors)
        {
            if (std::strcmp(tensor.variable, variable) == 0)
            {
                return position;
            }
            ++position;
        }
    }
    return -1;
}

constexpr char const* kKERNEL_VARIABLE = "T";

bool isAllowed(OpInfo const& op, TensorInfo const& tensor, DataType type)
{
    bool const compiled = std::strcmp(tensor.variable, kKERNEL_VARIABLE) == 0;
    return std::any_of(tensor.dtypes.begin(), tensor.dtypes.end(),
        [&](Dtype dtype) { return typeOf(dtype) == type && (!compiled || hasKernels(op, dtype)); });
}

//! \returns null where it is none of the tensor's.
Dtype const* find(TensorInfo const& tensor, DataType type)
{
    auto const found
        = std::find_if(tensor.dtypes.begin(), tensor.dtypes.end(), [&](Dtype dtype) { return typeOf(dtype) == type; });
    return found == tensor.dtypes.end() ? nullptr : found;
}

//! The dtype of a type variable of inputs.
template <typename TypeAt>
Dtype dtypeOf(OpInfo const& op, char const* variable, TypeAt&& typeAt)
{
    int32_t const position = firstOf(op, variable);
    TensorInfo const& tensor = op.inputs[position];
    if (auto const* const dtype = find(tensor, typeAt(position)))
    {
        return *dtype;
    }
    throw Error(std::string(tensor.name) + " in a dtype of the operator",
        "it has TensorRT's type " + std::to_string(static_cast<int32_t>(typeAt(position))), "cast it in the model");
}

//! Whether a tensor with a choice has the dtype that the kernels are compiled for, or one they cannot be compiled for.
bool fitsKernels(OpInfo const& op, TensorInfo const& tensor, DataType type, DataType kernels)
{
    TensorInfo const& first = op.inputs[firstOf(op, kKERNEL_VARIABLE)];
    return tensor.dtypes.size == 1 || type == kernels || find(first, type) == nullptr;
}

//! Writes the dtypes of the operator's choices behind its sizes.
template <typename TypeAt>
void addDtypes(OpInfo const& op, Sizes& sizes, TypeAt&& typeAt)
{
    for (int32_t i = 0; i < op.choices.size; ++i)
    {
        Dtype const dtype = dtypeOf(op, op.choices[i], typeAt);
        TensorInfo const& tensor = op.inputs[firstOf(op, op.choices[i])];
        if (!fitsKernels(op, tensor, typeOf(dtype), typeAt(firstOf(op, kKERNEL_VARIABLE))))
        {
            throw Error(std::string(tensor.name) + " in the dtype of " + op.inputs[0].name + " or one of its own",
                std::string("it is ") + nameOf(dtype), "cast it in the model");
        }
        sizes[op.symbols.size + i] = static_cast<int32_t>(dtype);
    }
}

std::string textOf(OpInfo const& op, TensorInfo const& tensor)
{
    std::string text;
    for (auto const& dim : tensor.shape)
    {
        text += text.empty() ? "[" : ", ";
        text += dim.symbol >= 0 ? op.symbols[dim.symbol] : std::to_string(dim.size);
    }
    return tensor.name + (" " + text) + "]";
}

std::string textOf(nvinfer1::Dims const& dims)
{
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

constexpr char const* kGIVE_SHAPES = "give tensors of the operator's shapes";

Error misfit(OpInfo const& op, TensorInfo const& tensor, nvinfer1::Dims const& dims, std::string const& condition)
{
    return {textOf(op, tensor) + condition, "its shape is " + textOf(dims), kGIVE_SHAPES};
}

void requireCount(char const* kind, int32_t expected, int32_t came)
{
    if (came != expected)
    {
        throw Error(std::to_string(expected) + " " + kind, std::to_string(came) + " came", kGIVE_SHAPES);
    }
}

bool hasLeading(TensorInfo const& tensor)
{
    return tensor.shape.size > 0 && tensor.shape[0].size == kLEADING;
}

bool hasRank(TensorInfo const& tensor, int32_t rank)
{
    return hasLeading(tensor) ? rank >= tensor.shape.size - 1 : rank == tensor.shape.size;
}

//! By how much dimensions lie behind those of the operator's shape, which has one for all leading ones.
int32_t shiftOf(TensorInfo const& tensor, int32_t rank)
{
    return rank - tensor.shape.size;
}

//! A dimension of the operator's shape in that of a tensor: -1 where it is not known.
int64_t sizeOf(TensorInfo const& tensor, nvinfer1::Dims const& dims, int32_t d)
{
    int32_t const shift = shiftOf(tensor, dims.nbDims);
    if (!hasLeading(tensor) || d > 0)
    {
        return dims.d[d + shift];
    }
    int64_t product = 1;
    for (int32_t i = 0; i <= shift; ++i)
    {
        if (dims.d[i] < 0)
        {
            return -1;
        }
        // Of two sizes below 2^31 the product fits; what is larger is refused by its first part.
        product = std::min(product, int64_t{INT32_MAX} + 1) * std::min<int64_t>(dims.d[i], INT32_MAX);
    }
    return product;
}

//! The sizes of all symbols.
//!
//! \param dimsOf dimensions of the i-th input.
//! \param exact whether those of one symbol must agree, as at run time; of bounds the largest is taken.
template <typename DimsOf>
Sizes bind(OpInfo const& op, bool exact, DimsOf&& dimsOf)
{
    Sizes sizes;
    sizes.fill(-1);
    for (int32_t i = 0; i < op.inputs.size; ++i)
    {
        TensorInfo const& tensor = op.inputs[i];
        nvinfer1::Dims const& dims = dimsOf(i);
        if (!hasRank(tensor, dims.nbDims))
        {
            throw misfit(op, tensor, dims, "");
        }
        for (int32_t d = 0; d < tensor.shape.size; ++d)
        {
            DimInfo const& dim = tensor.shape[d];
            bool const isSymbol = dim.symbol >= 0;
            int64_t const known = isSymbol ? sizes[dim.symbol] : dim.size;
            int64_t const size = sizeOf(tensor, dims, d);
            if (exact && known >= 0 && size != known)
            {
                throw misfit(op, tensor, dims,
                    isSymbol ? std::string(" with ") + op.symbols[dim.symbol] + " = " + std::to_string(known) : "");
            }
            if (size > INT32_MAX)
            {
                throw misfit(op, tensor, dims, " with sizes below 2^31");
            }
            if (isSymbol)
            {
                sizes[dim.symbol] = static_cast<int32_t>(std::max(known, size));
            }
        }
    }
    return sizes;
}

Sizes bind(OpInfo const& op, PluginTensorDesc const* inputs)
{
    Sizes sizes = bind(op, true, [&](int32_t i) -> nvinfer1::Dims const& { return inputs[i].dims; });
    addDtypes(op, sizes, [&](int32_t i) { return inputs[i].type; });
    return sizes;
}

Sizes smallestOf(OpInfo const& op, DynamicPluginTensorDesc const* inputs)
{
    Sizes sizes = bind(op, false, [&](int32_t i) -> nvinfer1::Dims const& { return inputs[i].min; });
    addDtypes(op, sizes, [&](int32_t i) { return inputs[i].desc.type; });
    return sizes;
}

Sizes largestOf(OpInfo const& op, DynamicPluginTensorDesc const* inputs)
{
    Sizes sizes = bind(op, false, [&](int32_t i) -> nvinfer1::Dims const& { return inputs[i].max; });
    addDtypes(op, sizes, [&](int32_t i) { return inputs[i].desc.type; });
    return sizes;
}

//! The dtype that the kernels are compiled for.
Dtype kernelDtype(OpInfo const& op, PluginTensorDesc const* inputs)
{
    return dtypeOf(op, kKERNEL_VARIABLE, [&](int32_t i) { return inputs[i].type; });
}

Dtype kernelDtype(OpInfo const& op, DynamicPluginTensorDesc const* inputs)
{
    return dtypeOf(op, kKERNEL_VARIABLE, [&](int32_t i) { return inputs[i].desc.type; });
}

bool isKnown(OpInfo const& op, Sizes const& sizes)
{
    return std::all_of(sizes.begin(), sizes.begin() + op.symbols.size, [](int32_t size) { return size >= 0; });
}

//! Appends the input dimensions behind a symbol, of which leading ones are many.
void append(OpInfo const& op, nvinfer1::DimsExprs const* inputs, int32_t symbol, nvinfer1::DimsExprs& output)
{
    for (int32_t i = 0; i < op.inputs.size; ++i)
    {
        TensorInfo const& tensor = op.inputs[i];
        int32_t const shift = shiftOf(tensor, inputs[i].nbDims);
        for (int32_t d = 0; d < tensor.shape.size; ++d)
        {
            if (tensor.shape[d].symbol == symbol)
            {
                bool const many = tensor.shape[d].size == kLEADING;
                for (int32_t from = many ? 0 : d + shift; from <= d + shift; ++from)
                {
                    output.d[output.nbDims++] = inputs[i].d[from];
                }
                return;
            }
        }
    }
    throw Error("every size of an output among those of the inputs", std::string(op.symbols[symbol]) + " is not",
        "correct the operator's dossier");
}

} // namespace

Plugin::Plugin(OpInfo const& op, std::string const& attributes)
    : mOp(op)
    , mTimingCacheId(std::string(kKERNELS_SHA256) + attributes)
{
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept
{
    nvinfer1::IPluginV3* cloned = nullptr;
    guarded(mOp.name, "clone", [&] { cloned = copy(); });
    return cloned;
}

char const* Plugin::getPluginName() const noexcept
{
    return mOp.name;
}

char const* Plugin::getPluginVersion() const noexcept
{
    return mOp.version;
}

char const* Plugin::getPluginNamespace() const noexcept
{
    return mOp.pluginNamespace;
}

int32_t Plugin::configurePlugin(
    DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) noexcept
{
    return codeOf(guarded(mOp.name, "configurePlugin", [&] {
        requireCount("inputs", mOp.inputs.size, nbInputs);
        for (auto const& sizes : {smallestOf(mOp, inputs), largestOf(mOp, inputs)})
        {
            if (isKnown(mOp, sizes))
            {
                checkSizes(kernelDtype(mOp, inputs), sizes);
            }
        }
    }));
}

int32_t Plugin::getOutputDataTypes(
    DataType* outputs, int32_t nbOutputs, DataType const* inputs, int32_t nbInputs) const noexcept
{
    return codeOf(guarded(mOp.name, "getOutputDataTypes", [&] {
        requireCount("inputs", mOp.inputs.size, nbInputs);
        requireCount("outputs", mOp.outputs.size, nbOutputs);
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            int32_t const first = firstOf(mOp, mOp.outputs[i].variable);
            outputs[i] = first < nbInputs ? inputs[first] : typeOf(mOp.outputs[i].dtypes[0]);
        }
    }));
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*,
    int32_t, nvinfer1::DimsExprs* outputs, int32_t nbOutputs, nvinfer1::IExprBuilder& builder) noexcept
{
    return codeOf(guarded(mOp.name, "getOutputShapes", [&] {
        requireCount("inputs", mOp.inputs.size, nbInputs);
        requireCount("outputs", mOp.outputs.size, nbOutputs);
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            if (!hasRank(mOp.inputs[i], inputs[i].nbDims))
            {
                throw Error(textOf(mOp, mOp.inputs[i]), "it has " + std::to_string(inputs[i].nbDims) + " dimensions",
                    kGIVE_SHAPES);
            }
        }
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            outputs[i].nbDims = 0;
            for (auto const& dim : mOp.outputs[i].shape)
            {
                if (dim.symbol >= 0)
                {
                    append(mOp, inputs, dim.symbol, outputs[i]);
                }
                else
                {
                    outputs[i].d[outputs[i].nbDims++] = builder.constant(dim.size);
                }
            }
        }
    }));
}

bool Plugin::supportsFormatCombination(
    int32_t position, DynamicPluginTensorDesc const* tensors, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    bool supported = false;
    guarded(mOp.name, "supportsFormatCombination", [&] {
        requireCount("inputs", mOp.inputs.size, nbInputs);
        requireCount("outputs", mOp.outputs.size, nbOutputs);
        TensorInfo const& tensor = position < nbInputs ? mOp.inputs[position] : mOp.outputs[position - nbInputs];
        PluginTensorDesc const& desc = tensors[position].desc;
        // What comes behind this position is not decided yet.
        int32_t const first = std::min(firstOf(mOp, tensor.variable), position);
        int32_t const kernels = std::min(firstOf(mOp, kKERNEL_VARIABLE), position);
        supported = desc.format == nvinfer1::TensorFormat::kLINEAR && isAllowed(mOp, tensor, desc.type)
            && desc.type == tensors[first].desc.type && fitsKernels(mOp, tensor, desc.type, tensors[kernels].desc.type);
    });
    return supported;
}

int32_t Plugin::getNbOutputs() const noexcept
{
    return mOp.outputs.size;
}

size_t Plugin::getWorkspaceSize(
    DynamicPluginTensorDesc const* inputs, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    size_t size = SIZE_MAX; // not to be had: better no engine than one that writes behind its workspace
    guarded(mOp.name, "getWorkspaceSize", [&] {
        requireCount("inputs", mOp.inputs.size, nbInputs);
        Sizes const largest = largestOf(mOp, inputs);
        if (!isKnown(mOp, largest))
        {
            throw Error(
                "largest sizes of all inputs", "some are not known", "give the builder an optimization profile");
        }
        size = workspaceOf(kernelDtype(mOp, inputs), largest);
    });
    return size;
}

char const* Plugin::getTimingCacheID() noexcept
{
    return mTimingCacheId.c_str();
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept
{
    return output >= 0 && output < mOp.outputs.size ? mOp.outputs[output].updates : -1;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept
{
    // Which kernels are needed depends on shapes and dtype: onShapeChange loads them.
    return clone();
}

int32_t Plugin::onShapeChange(
    PluginTensorDesc const* inputs, int32_t nbInputs, PluginTensorDesc const*, int32_t) noexcept
{
    return codeOf(guarded(mOp.name, "onShapeChange", [&] {
        requireCount("inputs", mOp.inputs.size, nbInputs);
        Sizes const sizes = bind(mOp, inputs);
        Dtype const dtype = kernelDtype(mOp, inputs);
        checkSizes(dtype, sizes);
        loadFor(dtype, sizes);
    }));
}

int32_t Plugin::enqueue(PluginTensorDesc const* inputDescs, PluginTensorDesc const*, void const* const* inputs,
    void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return codeOf(
        guarded(mOp.name, "enqueue", [&] { launchFor(bind(mOp, inputDescs), inputs, outputs, workspace, stream); }));
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept
{
    bool const succeeded = guarded(mOp.name, "getFieldsToSerialize", [&] {
        mFields = fields();
        mFieldCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    });
    return succeeded ? &mFieldCollection : nullptr;
}

} // namespace edgeattn
