//! Written from edgeattn/ops/fft_rope_attention.py by edgeattn.ops.cpp_header; not to be edited.
#pragma once

#include "core/op_info.h"

namespace edgeattn::fft_rope_attention
{

//! Sizes behind the symbols of the shapes.
struct Dims
{
    int32_t B;
    int32_t H;
    int32_t Tq;
    int32_t D;
    int32_t Hkv;
    int32_t S;
    int32_t C;
    int32_t Hb;
    int32_t N;

    static Dims of(Sizes const& sizes)
    {
        return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]};
    }
};

struct Attributes
{
    int32_t degree{2};
    int32_t sink{0};
    int32_t window{0};
    int32_t causal{1};
    int32_t row_centre{1};
    float scale{0.0F};

    //! Calls the visitor with name, value and whether every node must have it.
    template <typename Self, typename Visitor>
    static void visit(Self& self, Visitor&& visitor)
    {
        visitor("degree", self.degree, false);
        visitor("sink", self.sink, false);
        visitor("window", self.window, false);
        visitor("causal", self.causal, false);
        visitor("row_centre", self.row_centre, false);
        visitor("scale", self.scale, false);
    }
};

//! Where the tensors lie on the device.
struct Tensors
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
    void* y;
    int32_t* fallback_count;

    static Tensors of(void const* const* inputs, void* const* outputs)
    {
        return {static_cast<void const*>(inputs[0]),
            static_cast<void const*>(inputs[1]),
            static_cast<void const*>(inputs[2]),
            static_cast<float const*>(inputs[3]),
            static_cast<float const*>(inputs[4]),
            static_cast<float const*>(inputs[5]),
            static_cast<float const*>(inputs[6]),
            static_cast<int32_t const*>(inputs[7]),
            static_cast<int32_t const*>(inputs[8]),
            static_cast<void*>(outputs[0]),
            static_cast<int32_t*>(outputs[1])};
    }
};

inline constexpr char const* kSYMBOLS[] = {"B", "H", "Tq", "D", "Hkv", "S", "C", "Hb", "N"};
inline constexpr Dtype kDTYPES_T[] = {Dtype::kFP32, Dtype::kFP16, Dtype::kBF16};
inline constexpr Dtype kDTYPES_S[] = {Dtype::kFP32};
inline constexpr Dtype kDTYPES_I[] = {Dtype::kINT32};
inline constexpr DimInfo kSHAPE_q[] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_k[] = {{0, 0}, {4, 0}, {5, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_v[] = {{0, 0}, {4, 0}, {5, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_coefficients[] = {{1, 0}, {6, 0}};
inline constexpr DimInfo kSHAPE_key_mean[] = {{1, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_log_bias[] = {{7, 0}, {8, 0}};
inline constexpr DimInfo kSHAPE_score_bound[] = {{1, 0}};
inline constexpr DimInfo kSHAPE_backend[] = {{1, 0}};
inline constexpr DimInfo kSHAPE_kv_len[] = {{0, 0}};
inline constexpr DimInfo kSHAPE_y[] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_fallback_count[] = {{1, 0}};
inline constexpr TensorInfo kINPUTS[] = {
    {"q", "T", kDTYPES_T, kSHAPE_q, -1},
    {"k", "T", kDTYPES_T, kSHAPE_k, -1},
    {"v", "T", kDTYPES_T, kSHAPE_v, -1},
    {"coefficients", "S", kDTYPES_S, kSHAPE_coefficients, -1},
    {"key_mean", "S", kDTYPES_S, kSHAPE_key_mean, -1},
    {"log_bias", "S", kDTYPES_S, kSHAPE_log_bias, -1},
    {"score_bound", "S", kDTYPES_S, kSHAPE_score_bound, -1},
    {"backend", "I", kDTYPES_I, kSHAPE_backend, -1},
    {"kv_len", "I", kDTYPES_I, kSHAPE_kv_len, -1},
};
inline constexpr TensorInfo kOUTPUTS[] = {
    {"y", "T", kDTYPES_T, kSHAPE_y, -1},
    {"fallback_count", "I", kDTYPES_I, kSHAPE_fallback_count, -1},
};

inline constexpr OpInfo kINFO{"FftRopeAttention", "1", "edgeattn", "fft_rope_attention.",
    kSYMBOLS, kINPUTS, kOUTPUTS};

//! All of it, for OpPlugin.
struct Op
{
    using Dims = fft_rope_attention::Dims;
    using Attributes = fft_rope_attention::Attributes;
    using Tensors = fft_rope_attention::Tensors;
    static constexpr OpInfo const& kINFO = fft_rope_attention::kINFO;
};

} // namespace edgeattn::fft_rope_attention
