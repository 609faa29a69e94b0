//! Written from edgeattn/ops/bidirectional_linear_attention.py by edgeattn.ops.cpp_header; not to be edited.
#pragma once

#include "core/op_info.h"

namespace edgeattn::bidirectional_linear_attention
{

//! Sizes behind the symbols of the shapes.
struct Dims
{
    int32_t B;
    int32_t H;
    int32_t T;
    int32_t Dk;
    int32_t Dv;

    static Dims of(Sizes const& sizes)
    {
        return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    }
};

struct Attributes
{
    int32_t gate_shift{1};
    int32_t normalise{1};
    float scale{0.0F};
    float epsilon{1e-06F};

    //! Calls the visitor with name, value and whether every node must have it.
    template <typename Self, typename Visitor>
    static void visit(Self& self, Visitor&& visitor)
    {
        visitor("gate_shift", self.gate_shift, false);
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
    int32_t const* key_padding;
    void* y;

    static Tensors of(void const* const* inputs, void* const* outputs)
    {
        return {static_cast<void const*>(inputs[0]),
            static_cast<void const*>(inputs[1]),
            static_cast<void const*>(inputs[2]),
            static_cast<float const*>(inputs[3]),
            static_cast<int32_t const*>(inputs[4]),
            static_cast<void*>(outputs[0])};
    }
};

inline constexpr char const* kSYMBOLS[] = {"B", "H", "T", "Dk", "Dv"};
inline constexpr Dtype kDTYPES_T[] = {Dtype::kFP32, Dtype::kFP16, Dtype::kBF16};
inline constexpr Dtype kDTYPES_S[] = {Dtype::kFP32};
inline constexpr Dtype kDTYPES_P[] = {Dtype::kINT32};
inline constexpr DimInfo kSHAPE_q[] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_k[] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_v[] = {{0, 0}, {1, 0}, {2, 0}, {4, 0}};
inline constexpr DimInfo kSHAPE_log_decay[] = {{0, 0}, {1, 0}, {2, 0}};
inline constexpr DimInfo kSHAPE_key_padding[] = {{0, 0}, {2, 0}};
inline constexpr DimInfo kSHAPE_y[] = {{0, 0}, {1, 0}, {2, 0}, {4, 0}};
inline constexpr TensorInfo kINPUTS[] = {
    {"q", "T", kDTYPES_T, kSHAPE_q, -1},
    {"k", "T", kDTYPES_T, kSHAPE_k, -1},
    {"v", "T", kDTYPES_T, kSHAPE_v, -1},
    {"log_decay", "S", kDTYPES_S, kSHAPE_log_decay, -1},
    {"key_padding", "P", kDTYPES_P, kSHAPE_key_padding, -1},
};
inline constexpr TensorInfo kOUTPUTS[] = {
    {"y", "T", kDTYPES_T, kSHAPE_y, -1},
};

inline constexpr OpInfo kINFO{"BidirectionalLinearAttention", "1", "edgeattn", "bidirectional_linear_attention.",
    kSYMBOLS, kINPUTS, kOUTPUTS};

//! All of it, for OpPlugin.
struct Op
{
    using Dims = bidirectional_linear_attention::Dims;
    using Attributes = bidirectional_linear_attention::Attributes;
    using Tensors = bidirectional_linear_attention::Tensors;
    static constexpr OpInfo const& kINFO = bidirectional_linear_attention::kINFO;
};

} // namespace edgeattn::bidirectional_linear_attention
