//! Written from edgeattn/ops/recurrent_linear_attention.py by edgeattn.ops.cpp_header; not to be edited.
#pragma once

#include "core/op_info.h"

namespace edgeattn::recurrent_linear_attention
{

//! Sizes behind the symbols of the shapes.
struct Dims
{
    int32_t B;
    int32_t H;
    int32_t T;
    int32_t Dk;
    int32_t Hkv;
    int32_t Dv;
    int32_t Dg;

    static Dims of(Sizes const& sizes)
    {
        return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
    }
};

struct Attributes
{
    int32_t delta{0};
    int32_t normalise{0};
    float scale{0.0F};
    float epsilon{1e-06F};

    //! Calls the visitor with name, value and whether every node must have it.
    template <typename Self, typename Visitor>
    static void visit(Self& self, Visitor&& visitor)
    {
        visitor("delta", self.delta, false);
        visitor("normalise", self.normalise, false);
        visitor("scale", self.scale, false);
        visitor("epsilon", self.epsilon, false);
    }
};

//! Where the tensors lie on the device.
struct Tensors
{
    void const* q;
    void const* k;
    void const* v;
    float const* log_decay;
    float const* beta;
    float const* past_state;
    float const* past_normaliser;
    void* y;
    float* present_state;
    float* present_normaliser;

    static Tensors of(void const* const* inputs, void* const* outputs)
    {
        return {static_cast<void const*>(inputs[0]),
            static_cast<void const*>(inputs[1]),
            static_cast<void const*>(inputs[2]),
            static_cast<float const*>(inputs[3]),
            static_cast<float const*>(inputs[4]),
            static_cast<float const*>(inputs[5]),
            static_cast<float const*>(inputs[6]),
            static_cast<void*>(outputs[0]),
            static_cast<float*>(outputs[1]),
            static_cast<float*>(outputs[2])};
    }
};

inline constexpr char const* kSYMBOLS[] = {"B", "H", "T", "Dk", "Hkv", "Dv", "Dg"};
inline constexpr Dtype kDTYPES_T[] = {Dtype::kFP32, Dtype::kFP16, Dtype::kBF16};
inline constexpr Dtype kDTYPES_S[] = {Dtype::kFP32};
inline constexpr DimInfo kSHAPE_q[] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_k[] = {{0, 0}, {4, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_v[] = {{0, 0}, {4, 0}, {2, 0}, {5, 0}};
inline constexpr DimInfo kSHAPE_log_decay[] = {{0, 0}, {4, 0}, {2, 0}, {6, 0}};
inline constexpr DimInfo kSHAPE_beta[] = {{0, 0}, {4, 0}, {2, 0}};
inline constexpr DimInfo kSHAPE_past_state[] = {{0, 0}, {4, 0}, {3, 0}, {5, 0}};
inline constexpr DimInfo kSHAPE_past_normaliser[] = {{0, 0}, {4, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_y[] = {{0, 0}, {1, 0}, {2, 0}, {5, 0}};
inline constexpr DimInfo kSHAPE_present_state[] = {{0, 0}, {4, 0}, {3, 0}, {5, 0}};
inline constexpr DimInfo kSHAPE_present_normaliser[] = {{0, 0}, {4, 0}, {3, 0}};
inline constexpr TensorInfo kINPUTS[] = {
    {"q", "T", kDTYPES_T, kSHAPE_q, -1},
    {"k", "T", kDTYPES_T, kSHAPE_k, -1},
    {"v", "T", kDTYPES_T, kSHAPE_v, -1},
    {"log_decay", "S", kDTYPES_S, kSHAPE_log_decay, -1},
    {"beta", "S", kDTYPES_S, kSHAPE_beta, -1},
    {"past_state", "S", kDTYPES_S, kSHAPE_past_state, -1},
    {"past_normaliser", "S", kDTYPES_S, kSHAPE_past_normaliser, -1},
};
inline constexpr TensorInfo kOUTPUTS[] = {
    {"y", "T", kDTYPES_T, kSHAPE_y, -1},
    {"present_state", "S", kDTYPES_S, kSHAPE_present_state, 5},
    {"present_normaliser", "S", kDTYPES_S, kSHAPE_present_normaliser, 6},
};

inline constexpr OpInfo kINFO{"RecurrentLinearAttention", "1", "edgeattn", "recurrent_linear_attention.",
    kSYMBOLS, kINPUTS, kOUTPUTS};

//! All of it, for OpPlugin.
struct Op
{
    using Dims = recurrent_linear_attention::Dims;
    using Attributes = recurrent_linear_attention::Attributes;
    using Tensors = recurrent_linear_attention::Tensors;
    static constexpr OpInfo const& kINFO = recurrent_linear_attention::kINFO;
};

} // namespace edgeattn::recurrent_linear_attention
