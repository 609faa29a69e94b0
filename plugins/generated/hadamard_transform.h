//! Written from edgeattn/ops/hadamard_transform.py by edgeattn.ops.cpp_header; not to be edited.
#pragma once

#include "core/op_info.h"

namespace edgeattn::hadamard_transform
{

//! Sizes behind the symbols of the shapes.
struct Dims
{
    int32_t leading;
    int32_t N;
    int32_t K;
    int32_t M;

    static Dims of(Sizes const& sizes)
    {
        return {sizes[0], sizes[1], sizes[2], sizes[3]};
    }
};

struct Attributes
{

    //! Calls the visitor with name, value and whether every node must have it.
    template <typename Self, typename Visitor>
    static void visit(Self&, Visitor&&)
    {
    }
};

//! Where the tensors lie on the device.
struct Tensors
{
    void const* x;
    void const* left;
    void const* right;
    void* y;

    static Tensors of(void const* const* inputs, void* const* outputs)
    {
        return {static_cast<void const*>(inputs[0]),
            static_cast<void const*>(inputs[1]),
            static_cast<void const*>(inputs[2]),
            static_cast<void*>(outputs[0])};
    }
};

inline constexpr char const* kSYMBOLS[] = {"...", "N", "K", "M"};
inline constexpr Dtype kDTYPES_T[] = {Dtype::kFP32, Dtype::kFP16, Dtype::kBF16};
inline constexpr DimInfo kSHAPE_x[] = {{0, kLEADING}, {1, 0}};
inline constexpr DimInfo kSHAPE_left[] = {{2, 0}, {2, 0}};
inline constexpr DimInfo kSHAPE_right[] = {{3, 0}, {3, 0}};
inline constexpr DimInfo kSHAPE_y[] = {{0, kLEADING}, {1, 0}};
inline constexpr TensorInfo kINPUTS[] = {
    {"x", "T", kDTYPES_T, kSHAPE_x, -1},
    {"left", "T", kDTYPES_T, kSHAPE_left, -1},
    {"right", "T", kDTYPES_T, kSHAPE_right, -1},
};
inline constexpr TensorInfo kOUTPUTS[] = {
    {"y", "T", kDTYPES_T, kSHAPE_y, -1},
};

inline constexpr OpInfo kINFO{"HadamardTransform", "1", "edgeattn", "hadamard_transform.",
    kSYMBOLS, kINPUTS, kOUTPUTS};

//! All of it, for OpPlugin.
struct Op
{
    using Dims = hadamard_transform::Dims;
    using Attributes = hadamard_transform::Attributes;
    using Tensors = hadamard_transform::Tensors;
    static constexpr OpInfo const& kINFO = hadamard_transform::kINFO;
};

} // namespace edgeattn::hadamard_transform
