//! HeadSparseAttention: splits of the keys of active heads and their sum, or all heads at once.
#include "core/creator.h"
#include "edgeattn/error.hpp"
#include "core/launcher.h"
#include "generated/head_sparse_attention.h"
#include "generated/head_sparse_attention_kernels.h"
#include "ops/linear_attention.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace edgeattn::head_sparse_attention
{
namespace
{

//! The smallest head dimension that kernels are compiled for; smaller ones are padded to it.
constexpr int32_t kLEAST_BLOCK = 32;

//! As in kernels/head_sparse_attention.py: programs that keep a large GPU busy, and keys that are worth one.
constexpr int64_t kPROGRAMS = 1024;
constexpr int64_t kLEAST_KEYS = 128;
constexpr int64_t kMOST_SPLITS = 64;

//! Arguments and sizes of all kernels, under the names of kernels/head_sparse_attention.py.
struct Values
{
    void const* q;
    void const* k_cache;
    void const* v_cache;
    float const* k_scale;
    float const* v_scale;
    int32_t const* head_index;
    int32_t const* kv_len;
    float const* means;
    float const* weights;
    void const* y;
    int32_t const* error_count;
    int32_t B;
    int32_t T;
    int32_t HKV;
    int32_t G;
    int32_t S;
    int32_t D;
    int32_t K;
    int32_t SPLITS;
    int32_t groups;
    float scale;
};

bool isDecoding(Dims const& dims)
{
    return dims.T == 1;
}

//! Splits that the keys of one key head have at most, however few heads are active.
int64_t mostSplits(Dims const& dims)
{
    return std::max<int64_t>(1, std::min(cdiv(dims.S, kLEAST_KEYS), kMOST_SPLITS));
}

//! Splits of the keys of one key head, from the key heads that may be active.
int64_t splitsOf(Dims const& dims)
{
    int64_t const active = int64_t{dims.B} * std::max(1, std::min(dims.K, dims.Hkv));
    return std::min(cdiv(kPROGRAMS, std::max<int64_t>(active, 1)), mostSplits(dims));
}

//! Where the fp32 values between the kernels lie, in bytes from the start of the workspace.
struct Places
{
    //! \param splits of all sequences together.
    Places(Dims const& dims, int64_t splits)
    {
        linear_attention::Workspace workspace;
        means = workspace.take(splits * dims.H * dims.D);
        weights = workspace.take(splits * dims.H);
        size = workspace.size();
    }

    size_t means{0};
    size_t weights{0};
    size_t size{0};
};

Error refused(std::string const& expected, std::string const& came)
{
    return linear_attention::refused(Op::kINFO.name, expected, came + " came");
}

class HeadSparseAttention final : public OpPlugin<HeadSparseAttention, Op>
{
public:
    explicit HeadSparseAttention(Attributes const& attributes)
        : OpPlugin(attributes)
    {
        if (attributes.groups != 0 && attributes.groups != 1)
        {
            throw refused("groups of 0 or 1", std::to_string(attributes.groups));
        }
        if (!(attributes.scale >= 0 && std::isfinite(attributes.scale)))
        {
            throw refused("a finite scale of at least 0", std::to_string(attributes.scale));
        }
    }

private:
    void check(Dtype dtype, Dims const& dims) const override
    {
        if (dims.Hkv < 1 || dims.H % dims.Hkv != 0)
        {
            throw refused("query heads in groups of one size per key head",
                std::to_string(dims.H) + " for " + std::to_string(dims.Hkv));
        }
        if (dims.T < 1)
        {
            throw refused("at least one row", std::to_string(dims.T));
        }
        linear_attention::requireSizes(Op::kINFO.name, {dims.D}, std::max(dims.T, dims.S));
        forEachKernel(
            *this, dims, [&](auto const& kernel, View<Constant> constants) { kernel.require(dtype, constants); });
    }

    //! Whatever the number of rows is: fewer than the largest may be one. More active heads have fewer splits each.
    size_t workspaceSize(Dtype, Dims const& largest) const override
    {
        int64_t const splits = std::min(largest.B * mostSplits(largest), kPROGRAMS + largest.B);
        return Places(largest, splits).size;
    }

    void load(Dtype dtype, Dims const& dims) override
    {
        forEachKernel(*this, dims, [&](auto& kernel, View<Constant> constants) { kernel.load(dtype, constants); });
    }

    void launch(Dims const& dims, Tensors const& tensors, void* workspace, cudaStream_t stream) const override
    {
        Places const places(dims, isDecoding(dims) ? dims.B * splitsOf(dims) : 0);
        Values const values = valuesOf(dims, tensors, places, static_cast<char*>(workspace));
        forEachKernel(*this, dims, [&](auto const& kernel, View<Constant>) { kernel.launch(values, stream); });
    }

    //! Calls visitor(kernel, constants) for all kernels of a launch. The variant table decides on all other constants.
    template <typename Self, typename Visitor>
    static void forEachKernel(Self& self, Dims const& dims, Visitor&& visitor)
    {
        Constant const constants[] = {{"BLOCK", std::max(linear_attention::blockOf(dims.D), kLEAST_BLOCK)}};
        bool const isInt8 = dims.C == Dtype::kINT8;
        if (!isDecoding(dims))
        {
            isInt8 ? visitor(self.mPrefillInt8, constants) : visitor(self.mPrefill, constants);
            return;
        }
        isInt8 ? visitor(self.mDecodeInt8, constants) : visitor(self.mDecode, constants);
        visitor(self.mReduce, View<Constant>());
    }

    Values valuesOf(Dims const& dims, Tensors const& tensors, Places const& places, char* workspace) const
    {
        auto const at = [&](size_t start) { return reinterpret_cast<float const*>(workspace + start); };
        Values values{};
        values.q = tensors.q;
        values.k_cache = tensors.k_cache;
        values.v_cache = tensors.v_cache;
        values.k_scale = tensors.k_scale;
        values.v_scale = tensors.v_scale;
        values.head_index = tensors.head_index;
        values.kv_len = tensors.kv_len;
        values.means = at(places.means);
        values.weights = at(places.weights);
        values.y = tensors.y;
        values.error_count = tensors.error_count;
        values.B = dims.B;
        values.T = dims.T;
        values.HKV = dims.Hkv;
        values.G = dims.H / dims.Hkv;
        values.S = dims.S;
        values.D = dims.D;
        values.K = dims.K;
        values.SPLITS = static_cast<int32_t>(splitsOf(dims));
        values.groups = mAttributes.groups;
        values.scale = mAttributes.scale == 0.0F ? 1.0F / std::sqrt(static_cast<float>(dims.D)) : mAttributes.scale;
        return values;
    }

    LoadedKernel<Decode> mDecode;
    LoadedKernel<DecodeInt8> mDecodeInt8;
    LoadedKernel<Reduce> mReduce;
    LoadedKernel<Prefill> mPrefill;
    LoadedKernel<PrefillInt8> mPrefillInt8;
};

Registered<HeadSparseAttention> const kREGISTERED;

} // namespace
} // namespace edgeattn::head_sparse_attention
