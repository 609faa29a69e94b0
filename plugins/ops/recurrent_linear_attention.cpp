//! RecurrentLinearAttention: a few rows one after the other, or chunks of rows in three kernels.
#include "core/creator.h"
#include "edgeattn/error.hpp"
#include "core/launcher.h"
#include "generated/recurrent_linear_attention.h"
#include "generated/recurrent_linear_attention_kernels.h"
#include "ops/linear_attention.h"

#include <array>
#include <cmath>
#include <string>

namespace edgeattn::recurrent_linear_attention
{
namespace
{

using linear_attention::blockOf;
using linear_attention::kSPAN;
using linear_attention::requireSame;

//! Fewer rows than this are decoded.
constexpr int32_t kMIN_CHUNKED_ROWS = 16;

//! Another constant in which the kernels of a launch must agree: rows of a chunk.
constexpr char const* kCHUNK = "CHUNK";

//! Arguments and sizes of all kernels, under the names of kernels/recurrent_linear_attention.py.
struct Values
{
    void const* q;
    void const* k;
    void const* v;
    float const* log_decay;
    float const* beta;
    float const* past_state;
    float const* past_normaliser;
    void const* y;
    float const* present_state;
    float const* present_normaliser;
    float const* u;
    float const* w;
    float const* states;
    float const* normalisers;
    int32_t B;
    int32_t T;
    int32_t H;
    int32_t HKV;
    int32_t DK;
    int32_t DV;
    int32_t DG;
    int32_t delta;
    int32_t normalise;
    float scale;
    float epsilon;
};

bool isDecoding(Dims const& dims)
{
    return dims.T < kMIN_CHUNKED_ROWS;
}

//! Where the fp32 values between the kernels lie, in bytes from the start of the workspace.
struct Places
{
    Places() = default;

    //! \param span rows between the states that are written down.
    Places(Dims const& dims, bool delta, int64_t span)
    {
        int64_t const heads = int64_t{dims.B} * dims.Hkv;
        int64_t const spans = heads * cdiv(dims.T, span);
        linear_attention::Workspace workspace;
        u = workspace.take(delta ? heads * dims.T * dims.Dv : 0);
        w = workspace.take(delta ? heads * dims.T * dims.Dk : 0);
        states = workspace.take(spans * dims.Dk * dims.Dv);
        normalisers = workspace.take(spans * dims.Dk);
        size = workspace.size();
    }

    size_t u{0};
    size_t w{0};
    size_t states{0};
    size_t normalisers{0};
    size_t size{0};
};

Error refused(std::string const& expected, std::string const& came)
{
    return linear_attention::refused(Op::kINFO.name, expected, came);
}

class RecurrentLinearAttention final : public OpPlugin<RecurrentLinearAttention, Op>
{
public:
    explicit RecurrentLinearAttention(Attributes const& attributes)
        : OpPlugin(attributes)
    {
        for (auto const value : {attributes.delta, attributes.normalise})
        {
            if (value != 0 && value != 1)
            {
                throw refused("delta and normalise of 0 or 1", std::to_string(value) + " came");
            }
        }
        if (attributes.delta == 1 && attributes.normalise == 1)
        {
            throw refused("the delta rule without normaliser, which has no meaning there", "both came");
        }
        for (auto const value : {attributes.scale, attributes.epsilon})
        {
            if (!(value >= 0 && std::isfinite(value)))
            {
                throw refused("finite scale and epsilon of at least 0", std::to_string(value) + " came");
            }
        }
    }

private:
    void check(Dtype dtype, Dims const& dims) const override
    {
        if (dims.Hkv < 1 || dims.H % dims.Hkv != 0)
        {
            throw refused("query heads in groups of one size per key head",
                std::to_string(dims.H) + " for " + std::to_string(dims.Hkv) + " came");
        }
        if (dims.Dg != 1 && dims.Dg != dims.Dk)
        {
            throw refused("one log-decay per row or one per each of " + std::to_string(dims.Dk) + " channels",
                std::to_string(dims.Dg) + " came");
        }
        linear_attention::requireSizes(Op::kINFO.name, dims);
        forEachKernel(
            *this, dims, [&](auto const& kernel, View<Constant> constants) { kernel.require(dtype, constants); });
    }

    size_t workspaceSize(Dtype dtype, Dims const& largest) const override
    {
        if (isDecoding(largest))
        {
            return 0;
        }
        int64_t const span = mStates.smallest(dtype, constantsOfChunks(largest), kSPAN);
        return Places(largest, mAttributes.delta == 1, span).size;
    }

    void load(Dtype dtype, Dims const& dims) override
    {
        forEachKernel(*this, dims, [&](auto& kernel, View<Constant> constants) { kernel.load(dtype, constants); });
        if (isDecoding(dims))
        {
            return;
        }
        requireSame(Op::kINFO.name, mStates, mOutputs, kCHUNK);
        requireSame(Op::kINFO.name, mStates, mOutputs, kSPAN);
        if (mAttributes.delta == 1)
        {
            requireSame(Op::kINFO.name, mPrepare, mStates, kCHUNK);
        }
    }

    void launch(Dims const& dims, Tensors const& tensors, void* workspace, cudaStream_t stream) const override
    {
        if (isDecoding(dims))
        {
            mDecode.launch(valuesOf(dims, tensors, {}, nullptr), stream);
            return;
        }
        Places const places(dims, mAttributes.delta == 1, mStates.constant(kSPAN));
        Values const values = valuesOf(dims, tensors, places, static_cast<char*>(workspace));
        if (mAttributes.delta == 1)
        {
            mPrepare.launch(values, stream);
        }
        mStates.launch(values, stream);
        mOutputs.launch(values, stream);
    }

    //! Calls visitor(kernel, constants) for all kernels of a launch. The variant table decides on all other constants.
    template <typename Self, typename Visitor>
    static void forEachKernel(Self& self, Dims const& dims, Visitor&& visitor)
    {
        if (isDecoding(dims))
        {
            Constant const constants[] = {{"BLOCK", blockOf(dims)}, {"BLOCK_V", blockOf(dims)}};
            // The normaliser is read by the program of every value, and one of them may write it in place.
            visitor(self.mDecode, View<Constant>(constants, self.mAttributes.normalise == 1 ? 2 : 1));
            return;
        }
        auto const constants = constantsOfChunks(dims);
        if (self.mAttributes.delta == 1)
        {
            visitor(self.mPrepare, constants);
        }
        visitor(self.mStates, constants);
        visitor(self.mOutputs, constants);
    }

    static std::array<Constant, 2> constantsOfChunks(Dims const& dims)
    {
        return {{{"BLOCK", blockOf(dims)}, {"CHANNELS", dims.Dg == 1 ? 0 : 1}}};
    }

    Values valuesOf(Dims const& dims, Tensors const& tensors, Places const& places, char* workspace) const
    {
        auto const at = [&](size_t start) { return reinterpret_cast<float const*>(workspace + start); };
        Values values{};
        values.q = tensors.q;
        values.k = tensors.k;
        values.v = tensors.v;
        values.log_decay = tensors.log_decay;
        values.beta = tensors.beta;
        values.past_state = tensors.past_state;
        values.past_normaliser = tensors.past_normaliser;
        values.y = tensors.y;
        values.present_state = tensors.present_state;
        values.present_normaliser = tensors.present_normaliser;
        values.u = at(places.u);
        values.w = at(places.w);
        values.states = at(places.states);
        values.normalisers = at(places.normalisers);
        values.B = dims.B;
        values.T = dims.T;
        values.H = dims.H;
        values.HKV = dims.Hkv;
        values.DK = dims.Dk;
        values.DV = dims.Dv;
        values.DG = dims.Dg;
        values.delta = mAttributes.delta;
        values.normalise = mAttributes.normalise;
        values.scale = mAttributes.scale == 0.0F ? 1.0F / std::sqrt(static_cast<float>(dims.Dk)) : mAttributes.scale;
        values.epsilon = mAttributes.epsilon;
        return values;
    }

    LoadedKernel<Decode> mDecode;
    LoadedKernel<Prepare> mPrepare;
    LoadedKernel<States> mStates;
    LoadedKernel<Outputs> mOutputs;
};

Registered<RecurrentLinearAttention> const kREGISTERED;

} // namespace
} // namespace edgeattn::recurrent_linear_attention
