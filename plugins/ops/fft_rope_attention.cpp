//! FftRopeAttention: sums over far keys, by segments or FFT, where these are worth it; rows, and how many fell back.
#include "core/creator.h"
#include "edgeattn/error.hpp"
#include "core/launcher.h"
#include "generated/fft_rope_attention.h"
#include "generated/fft_rope_attention_kernels.h"
#include "ops/linear_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

namespace edgeattn::fft_rope_attention
{
namespace
{

//! As in edgeattn/ops/fft_rope_kernels.py.
constexpr int32_t kLEAST_BLOCK = 32;
constexpr int32_t kHIGHEST_STATE_DEGREE = 2;
constexpr int32_t kLEAST_SEGMENT = 512;
constexpr int32_t kLEAST_ROWS = 64;
constexpr int64_t kLEAST_SEGMENTS = 4;
constexpr int64_t kLINE = 64;
constexpr int64_t kMOST_POINTS = 16384;
constexpr int64_t kMOST_FEATURES = 256;

constexpr int32_t kHIGHEST_DEGREE = 4;

//! A constant in which the kernels of a launch must agree: rows that one program counts.
constexpr char const* kCHUNK = "CHUNK";

//! Arguments and sizes of all kernels, under the names of kernels/fft_rope_attention.py.
struct Values
{
    void const* q;
    void const* k;
    void const* v;
    float const* coefficients;
    float const* key_mean;
    float const* log_bias;
    float const* score_bound;
    int32_t const* backend;
    int32_t const* kv_len;
    float const* sums;
    float const* peaks;
    float const* shift;
    float const* spectra;
    float const* norms;
    float const* signals;
    float const* far_sums;
    void const* y;
    float const* fallbacks;
    int32_t const* fallback_count;
    int32_t B;
    int32_t HKV;
    int32_t G;
    int32_t TQ;
    int32_t S;
    int32_t D;
    int32_t C;
    int32_t HB;
    int32_t N;
    int32_t LEVELS;
    int32_t SEGMENT;
    int32_t SEGMENTS;
    int32_t POINTS;
    int32_t sink;
    int32_t window;
    int32_t causal;
    int32_t row_centre;
    float scale;
};

//! Products of at most so many coordinates, of which there are `width`.
int64_t featuresOf(int64_t width, int32_t degree)
{
    return degree == 0 ? 1 : degree == 1 ? width + 1 : (width + 1) * (width + 2) / 2;
}

//! Points of the FFT of so many rows and keys, in whole lines.
int64_t pointsOf(int64_t rows, int64_t keys)
{
    return cdiv(rows + keys - 1, kLINE) * kLINE;
}

//! Whether heads with the FFT are computed by it where rows and keys are few enough.
bool isConvolved(Dims const& dims, int32_t degree, int32_t offsets)
{
    return dims.Tq >= kLEAST_ROWS && offsets > 1 && degree <= kHIGHEST_STATE_DEGREE
        && featuresOf(dims.D, degree) <= kMOST_FEATURES;
}

//! Points of the FFT, 0 where there is none.
int32_t pointsOf(Dims const& dims, int32_t degree, int32_t offsets)
{
    int64_t const points = pointsOf(dims.Tq, dims.S);
    return isConvolved(dims, degree, offsets) && points <= kMOST_POINTS ? static_cast<int32_t>(points) : 0;
}

//! The segments of keys of which sums are kept: of so many keys, how many, and matrices of each.
struct Segments
{
    //! \param offsets N; with a table of biases, segments only serve heads with the FFT.
    Segments(Dims const& dims, int32_t degree, int32_t offsets)
        : levels(degree == kHIGHEST_STATE_DEGREE && offsets == 1 ? dims.D + 1 : 1)
        , length(std::max(kLEAST_SEGMENT, (levels - 1) * dims.D / 2))
    {
        bool const few = dims.Tq < kLEAST_ROWS || dims.S < kLEAST_SEGMENTS * length;
        bool const alone = offsets > 1 && pointsOf(dims, degree, offsets) == 0;
        bool const none = few || alone || degree > kHIGHEST_STATE_DEGREE;
        count = none ? 0 : static_cast<int32_t>(cdiv(dims.S, length));
    }

    int32_t levels;
    int32_t length;
    int32_t count{0};
};

//! Where the fp32 values between the kernels lie, in bytes from the start of the workspace.
struct Places
{
    //! \param points of the FFT.
    //! \param chunk rows that one program counts.
    Places(Dims const& dims, Segments const& segments, int64_t points, int64_t chunk)
    {
        int64_t const kvHeads = int64_t{dims.B} * dims.Hkv;
        int64_t const heads = int64_t{dims.B} * dims.H;
        int64_t const record = (int64_t{segments.levels} * (dims.D + 1) + 1) * dims.D;
        linear_attention::Workspace workspace;
        sums = workspace.take(kvHeads * segments.count * record);
        peaks = workspace.take(heads * segments.count);
        shift = workspace.take(segments.count > 0 ? kvHeads * dims.D : 0);
        int64_t const pairs = dims.D / 2 + 1;
        int64_t const rows = std::min(int64_t{dims.Tq}, points);
        spectra = workspace.take(dims.H * 2 * points);
        norms = workspace.take(points > 0 ? dims.H * 2 : 0);
        // The kernel `spectrum` works there before it is a sequence's.
        signals = workspace.take(std::max<int64_t>(heads, dims.H) * pairs * 4 * points);
        farSums = workspace.take(heads * dims.C * pairs * 2 * rows);
        fallbacks = workspace.take(heads * cdiv(dims.Tq, chunk));
        size = workspace.size();
    }

    size_t sums{0};
    size_t peaks{0};
    size_t shift{0};
    size_t spectra{0};
    size_t norms{0};
    size_t signals{0};
    size_t farSums{0};
    size_t fallbacks{0};
    size_t size{0};
};

Error refused(std::string const& expected, std::string const& came)
{
    return linear_attention::refused(Op::kINFO.name, expected, came + " came");
}

class FftRopeAttention final : public OpPlugin<FftRopeAttention, Op>
{
public:
    explicit FftRopeAttention(Attributes const& attributes)
        : OpPlugin(attributes)
    {
        if (attributes.degree < 0 || attributes.degree > kHIGHEST_DEGREE)
        {
            throw refused("a degree from 0 to " + std::to_string(kHIGHEST_DEGREE), std::to_string(attributes.degree));
        }
        if (attributes.sink < 0 || attributes.window < 0)
        {
            throw refused("sink and window of at least 0",
                std::to_string(attributes.sink) + " and " + std::to_string(attributes.window));
        }
        for (auto const value : {attributes.causal, attributes.row_centre})
        {
            if (value != 0 && value != 1)
            {
                throw refused("causal and row_centre of 0 or 1", std::to_string(value));
            }
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
        if (dims.C != mAttributes.degree + 1)
        {
            throw refused(std::to_string(mAttributes.degree + 1) + " coefficients per head for degree "
                    + std::to_string(mAttributes.degree),
                std::to_string(dims.C));
        }
        if (dims.Hb != 1 && dims.Hb != dims.H)
        {
            throw refused("one log_bias for all heads or one for each of " + std::to_string(dims.H),
                std::to_string(dims.Hb));
        }
        int64_t const offsets = 2 * int64_t{dims.S} - 1;
        if (dims.N % 2 == 0 || (dims.N != 1 && dims.N < offsets))
        {
            throw refused("log_bias at 1 offset or an odd number of them from " + std::to_string(offsets) + " on, for "
                    + std::to_string(dims.S) + " keys",
                std::to_string(dims.N));
        }
        linear_attention::requireSizes(Op::kINFO.name, {dims.D}, std::max(dims.Tq, dims.S));
        forEachKernel(
            *this, dims, [&](auto const& kernel, View<Constant> constants) { kernel.require(dtype, constants); });
    }

    //! Whatever the sizes are: one offset alone may have more segments, and fewer rows and keys the FFT. Head dimensions
    //! are constants of a graph.
    size_t workspaceSize(Dtype dtype, Dims const& largest) const override
    {
        int64_t const chunk = mAttend.smallest(dtype, constantsOf(largest), kCHUNK);
        bool const convolved = isConvolved(largest, mAttributes.degree, largest.N);
        int64_t const points = convolved ? std::min(pointsOf(largest.Tq, largest.S), kMOST_POINTS) : 0;
        return Places(largest, Segments(largest, mAttributes.degree, 1), points, chunk).size;
    }

    void load(Dtype dtype, Dims const& dims) override
    {
        forEachKernel(*this, dims, [&](auto& kernel, View<Constant> constants) { kernel.load(dtype, constants); });
        linear_attention::requireSame(Op::kINFO.name, mAttend, mCount, kCHUNK);
    }

    void launch(Dims const& dims, Tensors const& tensors, void* workspace, cudaStream_t stream) const override
    {
        Values const values = valuesOf(dims, tensors, static_cast<char*>(workspace));
        forEachKernel(*this, dims, [&](auto const& kernel, View<Constant>) { kernel.launch(values, stream); });
    }

    //! Calls visitor(kernel, constants) for all kernels of a launch. The variant table decides on all other constants.
    template <typename Self, typename Visitor>
    static void forEachKernel(Self& self, Dims const& dims, Visitor&& visitor)
    {
        auto const constants = constantsOf(dims);
        int32_t const degree = self.mAttributes.degree;
        if (Segments(dims, degree, dims.N).count > 0)
        {
            visitor(self.mStates, constants);
            visitor(self.mPrefix, View<Constant>());
        }
        if (pointsOf(dims, degree, dims.N) > 0)
        {
            visitor(self.mSpectrum, View<Constant>());
            visitor(self.mConvolve, View<Constant>());
        }
        visitor(self.mAttend, constants);
        visitor(self.mCount, View<Constant>());
    }

    static std::array<Constant, 1> constantsOf(Dims const& dims)
    {
        return {{{"BLOCK", std::max(linear_attention::blockOf(dims.D), kLEAST_BLOCK)}}};
    }

    Values valuesOf(Dims const& dims, Tensors const& tensors, char* workspace) const
    {
        Segments const segments(dims, mAttributes.degree, dims.N);
        int32_t const points = pointsOf(dims, mAttributes.degree, dims.N);
        Places const places(dims, segments, points, mAttend.constant(kCHUNK));
        auto const at = [&](size_t start) { return reinterpret_cast<float const*>(workspace + start); };
        Values values{};
        values.q = tensors.q;
        values.k = tensors.k;
        values.v = tensors.v;
        values.coefficients = tensors.coefficients;
        values.key_mean = tensors.key_mean;
        values.log_bias = tensors.log_bias;
        values.score_bound = tensors.score_bound;
        values.backend = tensors.backend;
        values.kv_len = tensors.kv_len;
        values.sums = at(places.sums);
        values.peaks = at(places.peaks);
        values.shift = at(places.shift);
        values.spectra = at(places.spectra);
        values.norms = at(places.norms);
        values.signals = at(places.signals);
        values.far_sums = at(places.farSums);
        values.y = tensors.y;
        values.fallbacks = at(places.fallbacks);
        values.fallback_count = tensors.fallback_count;
        values.B = dims.B;
        values.HKV = dims.Hkv;
        values.G = dims.H / dims.Hkv;
        values.TQ = dims.Tq;
        values.S = dims.S;
        values.D = dims.D;
        values.C = dims.C;
        values.HB = dims.Hb;
        values.N = dims.N;
        values.LEVELS = segments.levels;
        values.SEGMENT = segments.length;
        values.SEGMENTS = segments.count;
        values.POINTS = points;
        values.sink = mAttributes.sink;
        values.window = mAttributes.window;
        values.causal = mAttributes.causal;
        values.row_centre = mAttributes.row_centre;
        values.scale = mAttributes.scale == 0.0F ? 1.0F / std::sqrt(static_cast<float>(dims.D)) : mAttributes.scale;
        return values;
    }

    LoadedKernel<States> mStates;
    LoadedKernel<Prefix> mPrefix;
    LoadedKernel<Spectrum> mSpectrum;
    LoadedKernel<Convolve> mConvolve;
    LoadedKernel<Attend> mAttend;
    LoadedKernel<Count> mCount;
};

Registered<FftRopeAttention> const kREGISTERED;

} // namespace
} // namespace edgeattn::fft_rope_attention
