//! Written from edgeattn/ops/head_sparse_attention.py by edgeattn.ops.cpp_header; not to be edited.
#pragma once

#include "core/op_info.h"

namespace edgeattn::head_sparse_attention
{

//! Sizes behind the symbols of the shapes, and dtypes of type variables.
struct Dims
{
    int32_t B;
    int32_t H;
    int32_t T;
    int32_t D;
    int32_t Hkv;
    int32_t S;
    int32_t K;
    Dtype C;

    static Dims of(Sizes const& sizes)
    {
        return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], static_cast<Dtype>(sizes[7])};
    }
};

struct Attributes
{
    int32_t groups{0};
    float scale{0.0F};

    //! Calls the visitor with name, value and whether every node must have it.
    template <typename Self, typename Visitor>
    static void visit(Self& self, Visitor&& visitor)
    {
        visitor("groups", self.groups, false);
        visitor("scale", self.scale, false);
    }
};

//! Where the tensors lie on the device.
struct Tensors
{
    void const* q;
    void const* k_cache;
    void const* v_cache;
    float const* k_scale;
    float const* v_scale;
    int32_t const* head_index;
    int32_t const* kv_len;
    void* y;
    int32_t* error_count;

    static Tensors of(void const* const* inputs, void* const* outputs)
    {
        return {static_cast<void const*>(inputs[0]),
            static_cast<void const*>(inputs[1]),
            static_cast<void const*>(inputs[2]),
            static_cast<float const*>(inputs[3]),
            static_cast<float const*>(inputs[4]),
            static_cast<int32_t const*>(inputs[5]),
            static_cast<int32_t const*>(inputs[6]),
            static_cast<void*>(outputs[0]),
            static_cast<int32_t*>(outputs[1])};
    }
};

inline constexpr char const* kSYMBOLS[] = {"B", "H", "T", "D", "Hkv", "S", "K"};
inline constexpr Dtype kDTYPES_T[] = {Dtype::kFP32, Dtype::kFP16, Dtype::kBF16};
inline constexpr Dtype kDTYPES_C[] = {Dtype::kFP32, Dtype::kFP16, Dtype::kBF16, Dtype::kINT8};
inline constexpr Dtype kDTYPES_S[] = {Dtype::kFP32};
inline constexpr Dtype kDTYPES_I[] = {Dtype::kINT32};
inline constexpr DimInfo kSHAPE_q[] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_k_cache[] = {{0, 0}, {4, 0}, {5, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_v_cache[] = {{0, 0}, {4, 0}, {5, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_k_scale[] = {{4, 0}};
inline constexpr DimInfo kSHAPE_v_scale[] = {{4, 0}};
inline constexpr DimInfo kSHAPE_head_index[] = {{0, 0}, {6, 0}};
inline constexpr DimInfo kSHAPE_kv_len[] = {{0, 0}};
inline constexpr DimInfo kSHAPE_y[] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_error_count[] = {{0, 0}};
inline constexpr TensorInfo kINPUTS[] = {
    {"q", "T", kDTYPES_T, kSHAPE_q, -1},
    {"k_cache", "C", kDTYPES_C, kSHAPE_k_cache, -1},
    {"v_cache", "C", kDTYPES_C, kSHAPE_v_cache, -1},
    {"k_scale", "S", kDTYPES_S, kSHAPE_k_scale, -1},
    {"v_scale", "S", kDTYPES_S, kSHAPE_v_scale, -1},
    {"head_index", "I", kDTYPES_I, kSHAPE_head_index, -1},
    {"kv_len", "I", kDTYPES_I, kSHAPE_kv_len, -1},
};
inline constexpr TensorInfo kOUTPUTS[] = {
    {"y", "T", kDTYPES_T, kSHAPE_y, -1},
    {"error_count", "I", kDTYPES_I, kSHAPE_error_count, -1},
};

inline constexpr char const* kCHOICES[] = {"C"};

inline constexpr OpInfo kINFO{"HeadSparseAttention", "1", "edgeattn", "head_sparse_attention.",
    kSYMBOLS, kINPUTS, kOUTPUTS, kCHOICES};

//! All of it, for OpPlugin.
struct Op
{
    using Dims = head_sparse_attention::Dims;
    using Attributes = head_sparse_attention::Attributes;
    using Tensors = head_sparse_attention::Tensors;
    static constexpr OpInfo const& kINFO = head_sparse_attention::kINFO;
};

} // namespace edgeattn::head_sparse_attention
