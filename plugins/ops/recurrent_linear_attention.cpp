//! RecurrentLinearAttention: a few rows one after the other, or chunks of rows in three kernels.
#include "core/creator.h"
#include "core/error.h"
#include "core/launcher.h"
#include "generated/recurrent_linear_attention.h"
#include "generated/recurrent_linear_attention_kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <string>

namespace edgeattn::recurrent_linear_attention
{
namespace
{

//! Fewer rows than this are decoded.
constexpr int32_t kMIN_CHUNKED_ROWS = 16;

//! To one of these Dk and Dv are padded in the kernels.
constexpr int32_t kBLOCKS[] = {16, 32, 64, 128};
constexpr int32_t kMAX_WIDTH = 128;

//! Constants in which the kernels of a launch must agree: rows of a chunk, and between states that are written down.
constexpr char const* kCHUNK = "CHUNK";
constexpr char const* kSPAN = "SPAN";

//! The kernels load vectors, rows of which must not end within one.
constexpr int32_t kALIGNMENT = 8;

//! Rows times the larger head dimension: kernels count within a head in int32.
constexpr int32_t kMOST_NUMBERS = 1 << 29;

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

int32_t blockOf(Dims const& dims)
{
    return *std::lower_bound(std::begin(kBLOCKS), std::end(kBLOCKS) - 1, std::max(dims.Dk, dims.Dv));
}

//! Where the fp32 values between the kernels lie, in bytes from the start of the workspace.
struct Workspace
{
    Workspace() = default;

    //! \param span rows between the states that are written down.
    Workspace(Dims const& dims, bool delta, int64_t span)
    {
        int64_t const heads = int64_t{dims.B} * dims.Hkv;
        int64_t const spans = heads * cdiv(dims.T, span);
        u = take(delta ? heads * dims.T * dims.Dv : 0);
        w = take(delta ? heads * dims.T * dims.Dk : 0);
        states = take(spans * dims.Dk * dims.Dv);
        normalisers = take(spans * dims.Dk);
    }

    size_t u{0};
    size_t w{0};
    size_t states{0};
    size_t normalisers{0};
    size_t size{0};

private:
    size_t take(int64_t numbers)
    {
        constexpr int64_t kALIGNMENT = 256;
        size_t const start = size;
        size += static_cast<size_t>(cdiv(numbers * int64_t{sizeof(float)}, kALIGNMENT) * kALIGNMENT);
        return start;
    }
};

Error refused(std::string const& expected, std::string const& came)
{
    return {expected, came, "see RecurrentLinearAttention in edgeattn.ops"};
}

template <typename First, typename Second>
void requireSame(First const& first, Second const& second, char const* constant)
{
    if (first.constant(constant) != second.constant(constant))
    {
        throw Error(std::string("kernels of RecurrentLinearAttention with one ") + constant, "they have two",
            "correct kernels/variants.toml and build the library again");
    }
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
        for (auto const width : {dims.Dk, dims.Dv})
        {
            if (width < 1 || width > kMAX_WIDTH || width % kALIGNMENT != 0)
            {
                throw refused("head dimensions that are multiples of " + std::to_string(kALIGNMENT) + " up to "
                        + std::to_string(kMAX_WIDTH),
                    std::to_string(width) + " came");
            }
        }
        auto const widest = std::max(dims.Dk, dims.Dv);
        if (dims.T > kMOST_NUMBERS / widest)
        {
            throw refused("at most " + std::to_string(kMOST_NUMBERS / widest) + " rows of " + std::to_string(widest)
                    + " numbers",
                std::to_string(dims.T) + " came");
        }
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
        return Workspace(largest, mAttributes.delta == 1, span).size;
    }

    void load(Dtype dtype, Dims const& dims) override
    {
        forEachKernel(*this, dims, [&](auto& kernel, View<Constant> constants) { kernel.load(dtype, constants); });
        if (isDecoding(dims))
        {
            return;
        }
        requireSame(mStates, mOutputs, kCHUNK);
        requireSame(mStates, mOutputs, kSPAN);
        if (mAttributes.delta == 1)
        {
            requireSame(mPrepare, mStates, kCHUNK);
        }
    }

    void launch(Dims const& dims, Tensors const& tensors, void* workspace, cudaStream_t stream) const override
    {
        if (isDecoding(dims))
        {
            mDecode.launch(valuesOf(dims, tensors, {}, nullptr), stream);
            return;
        }
        Workspace const places(dims, mAttributes.delta == 1, mStates.constant(kSPAN));
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

    Values valuesOf(Dims const& dims, Tensors const& tensors, Workspace const& places, char* workspace) const
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
