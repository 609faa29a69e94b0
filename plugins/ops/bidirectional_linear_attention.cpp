//! BidirectionalLinearAttention: the states of both directions, then all chunks at once.
#include "core/creator.h"
#include "edgeattn/error.hpp"
#include "core/launcher.h"
#include "generated/bidirectional_linear_attention.h"
#include "generated/bidirectional_linear_attention_kernels.h"
#include "ops/linear_attention.h"

#include <array>
#include <cmath>
#include <string>

namespace edgeattn::bidirectional_linear_attention
{
namespace
{

using linear_attention::kSPAN;

//! A row that sees no key is divided by epsilon alone, whose reciprocal must be a number in fp32.
constexpr float kLEAST_EPSILON = 1e-37F;

//! Arguments and sizes of both kernels, under the names of kernels/bidirectional_linear_attention.py.
struct Values
{
    void const* q;
    void const* k;
    void const* v;
    float const* log_decay;
    int32_t const* key_padding;
    float const* states;
    float const* normalisers;
    void const* y;
    int32_t B;
    int32_t T;
    int32_t H;
    int32_t DK;
    int32_t DV;
    int32_t gate_shift;
    int32_t normalise;
    float scale;
    float epsilon;
};

std::array<Constant, 1> constantsOf(Dims const& dims)
{
    return {{{"BLOCK", linear_attention::blockOf(dims)}}};
}

//! Where the fp32 values between the kernels lie, in bytes from the start of the workspace.
struct Places
{
    //! \param span rows between the states that are written down.
    Places(Dims const& dims, int64_t span)
    {
        constexpr int64_t kDIRECTIONS = 2;
        int64_t const spans = int64_t{dims.B} * dims.H * kDIRECTIONS * cdiv(dims.T, span);
        linear_attention::Workspace workspace;
        states = workspace.take(spans * dims.Dk * dims.Dv);
        normalisers = workspace.take(spans * dims.Dk);
        size = workspace.size();
    }

    size_t states{0};
    size_t normalisers{0};
    size_t size{0};
};

template <typename Number>
Error refused(std::string const& expected, Number came)
{
    return linear_attention::refused(Op::kINFO.name, expected, std::to_string(came) + " came");
}

class BidirectionalLinearAttention final : public OpPlugin<BidirectionalLinearAttention, Op>
{
public:
    explicit BidirectionalLinearAttention(Attributes const& attributes)
        : OpPlugin(attributes)
    {
        for (auto const value : {attributes.gate_shift, attributes.normalise})
        {
            if (value != 0 && value != 1)
            {
                throw refused("gate_shift and normalise of 0 or 1", value);
            }
        }
        for (auto const value : {attributes.scale, attributes.epsilon})
        {
            if (!(value >= 0 && std::isfinite(value)))
            {
                throw refused("finite scale and epsilon of at least 0", value);
            }
        }
        if (attributes.normalise == 1 && attributes.epsilon < kLEAST_EPSILON)
        {
            throw refused("an epsilon of at least 1e-37 for the normaliser", attributes.epsilon);
        }
    }

private:
    void check(Dtype dtype, Dims const& dims) const override
    {
        linear_attention::requireSizes(Op::kINFO.name, dims);
        mStates.require(dtype, constantsOf(dims));
        mOutputs.require(dtype, constantsOf(dims));
    }

    size_t workspaceSize(Dtype dtype, Dims const& largest) const override
    {
        return Places(largest, mStates.smallest(dtype, constantsOf(largest), kSPAN)).size;
    }

    void load(Dtype dtype, Dims const& dims) override
    {
        mStates.load(dtype, constantsOf(dims));
        mOutputs.load(dtype, constantsOf(dims));
        linear_attention::requireSame(Op::kINFO.name, mStates, mOutputs, kSPAN);
    }

    void launch(Dims const& dims, Tensors const& tensors, void* workspace, cudaStream_t stream) const override
    {
        Places const places(dims, mStates.constant(kSPAN));
        Values const values = valuesOf(dims, tensors, places, static_cast<char*>(workspace));
        mStates.launch(values, stream);
        mOutputs.launch(values, stream);
    }

    Values valuesOf(Dims const& dims, Tensors const& tensors, Places const& places, char* workspace) const
    {
        Values values{};
        values.q = tensors.q;
        values.k = tensors.k;
        values.v = tensors.v;
        values.log_decay = tensors.log_decay;
        values.key_padding = tensors.key_padding;
        values.states = reinterpret_cast<float const*>(workspace + places.states);
        values.normalisers = reinterpret_cast<float const*>(workspace + places.normalisers);
        values.y = tensors.y;
        values.B = dims.B;
        values.T = dims.T;
        values.H = dims.H;
        values.DK = dims.Dk;
        values.DV = dims.Dv;
        values.gate_shift = mAttributes.gate_shift;
        values.normalise = mAttributes.normalise;
        values.scale = mAttributes.scale == 0.0F ? 1.0F / std::sqrt(static_cast<float>(dims.Dk)) : mAttributes.scale;
        values.epsilon = mAttributes.epsilon;
        return values;
    }

    LoadedKernel<States> mStates;
    LoadedKernel<Outputs> mOutputs;
};

Registered<BidirectionalLinearAttention> const kREGISTERED;

} // namespace
} // namespace edgeattn::bidirectional_linear_attention
