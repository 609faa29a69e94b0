//! HadamardTransform: one kernel that multiplies with both factors.
#include "core/creator.h"
#include "edgeattn/error.hpp"
#include "core/launcher.h"
#include "generated/hadamard_transform.h"
#include "generated/hadamard_transform_kernels.h"

#include <array>
#include <cmath>
#include <string>

namespace edgeattn::hadamard_transform
{
namespace
{

//! Of the left factor: what a tile of the largest variant holds.
constexpr int32_t kLARGEST_LEFT = 256;

//! Arguments of the kernel, under the names of kernels/hadamard_transform.py: x is a matrix [L, M] there.
struct Values
{
    void const* x;
    void const* left;
    void const* right;
    void const* y;
    int32_t L;
    int32_t K;
    int32_t M;
    int32_t TILE;
    float scale;
};

//! Rows of x, seen as a matrix with the columns of the right factor.
int64_t rowsOf(Dims const& dims)
{
    return int64_t{dims.leading} * (dims.N / dims.M);
}

//! Rows of a tile, into which whole blocks of the left factor fit.
int32_t blockOf(Dims const& dims)
{
    return dims.K <= 64 ? 64 : dims.K <= 128 ? 128 : 256;
}

std::array<Constant, 3> constantsOf(Dims const& dims)
{
    int32_t const block = blockOf(dims);
    bool const isWide = block == 128 || (block == 64 && dims.M > 64);
    int32_t const vector = dims.M % 8 == 0 ? 8 : dims.M % 4 == 0 ? 4 : 1;
    return {{{"BLOCK_K", block}, {"BLOCK_M", isWide ? 128 : 64}, {"VECTOR", vector}}};
}

Error refused(std::string const& expected, std::string const& came)
{
    return {expected, came + " came", "see HadamardTransform in edgeattn.ops"};
}

class HadamardTransform final : public OpPlugin<HadamardTransform, Op>
{
public:
    using OpPlugin::OpPlugin;

private:
    void check(Dtype dtype, Dims const& dims) const override
    {
        int64_t const size = int64_t{dims.K} * dims.M;
        if (size < 1 || dims.N < 1 || dims.N % size != 0)
        {
            throw refused("rows of a multiple of " + std::to_string(dims.K) + " x " + std::to_string(dims.M)
                    + " numbers, as the factors are",
                std::to_string(dims.N));
        }
        if (dims.K > kLARGEST_LEFT)
        {
            throw refused(
                "a left factor of order " + std::to_string(kLARGEST_LEFT) + " at most", std::to_string(dims.K));
        }
        if (rowsOf(dims) > INT32_MAX)
        {
            throw refused("at most " + std::to_string(int64_t{INT32_MAX} * dims.M) + " numbers",
                std::to_string(rowsOf(dims) * dims.M));
        }
        mTransform.require(dtype, constantsOf(dims));
    }

    size_t workspaceSize(Dtype, Dims const&) const override
    {
        return 0;
    }

    void load(Dtype dtype, Dims const& dims) override
    {
        mTransform.load(dtype, constantsOf(dims));
    }

    void launch(Dims const& dims, Tensors const& tensors, void*, cudaStream_t stream) const override
    {
        Values values{};
        values.x = tensors.x;
        values.left = tensors.left;
        values.right = tensors.right;
        values.y = tensors.y;
        values.L = static_cast<int32_t>(rowsOf(dims));
        values.K = dims.K;
        values.M = dims.M;
        values.TILE = blockOf(dims) / dims.K * dims.K;
        values.scale = 1.0F / std::sqrt(static_cast<float>(dims.K) * static_cast<float>(dims.M));
        mTransform.launch(values, stream);
    }

    LoadedKernel<Transform> mTransform;
};

Registered<HadamardTransform> const kREGISTERED;

} // namespace
} // namespace edgeattn::hadamard_transform
