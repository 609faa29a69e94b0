//! Written from kernels/bidirectional_linear_attention.py by edgeattn.kernels.cpp_header; not to be edited.
#pragma once

#include "core/kernel.h"

namespace edgeattn::bidirectional_linear_attention
{

struct States
{
    static constexpr char const* kNAME = "bidirectional_linear_attention.states";
    static constexpr char const* kSIGNATURE
        = "k *T, v *T, log_decay *fp32, key_padding *i32, states *fp32, normalisers *fp32, T i32, H i32, DK i32, DV "
          "i32, gate_shift i32, normalise i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"BLOCK_V"};

    struct Arguments
    {
        void const* k;
        void const* v;
        float const* log_decay;
        int32_t const* key_padding;
        float const* states;
        float const* normalisers;
        int32_t T;
        int32_t H;
        int32_t DK;
        int32_t DV;
        int32_t gate_shift;
        int32_t normalise;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.k, values.v, values.log_decay, values.key_padding, values.states, values.normalisers, values.T,
            values.H, values.DK, values.DV, values.gate_shift, values.normalise, nullptr, nullptr};
    }

    static std::array<void*, 14> addresses(Arguments& arguments)
    {
        return {&arguments.k, &arguments.v, &arguments.log_decay, &arguments.key_padding, &arguments.states,
            &arguments.normalisers, &arguments.T, &arguments.H, &arguments.DK, &arguments.DV, &arguments.gate_shift,
            &arguments.normalise, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const H = values.H;
        int64_t const B = values.B;
        int64_t const DV = values.DV;
        int64_t const BLOCK_V = constants[0];
        return {2 * cdiv(DV, BLOCK_V) * B * H, 1, 1};
    }
};

struct Outputs
{
    static constexpr char const* kNAME = "bidirectional_linear_attention.outputs";
    static constexpr char const* kSIGNATURE
        = "q *T, k *T, v *T, log_decay *fp32, key_padding *i32, states *fp32, normalisers *fp32, y *T, T i32, H i32, "
          "DK i32, DV i32, gate_shift i32, normalise i32, scale fp32, epsilon fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 2>;
    static constexpr std::array<char const*, 2> kGRID_CONSTANTS{"CHUNK", "BLOCK_V"};

    struct Arguments
    {
        void const* q;
        void const* k;
        void const* v;
        float const* log_decay;
        int32_t const* key_padding;
        float const* states;
        float const* normalisers;
        void const* y;
        int32_t T;
        int32_t H;
        int32_t DK;
        int32_t DV;
        int32_t gate_shift;
        int32_t normalise;
        float scale;
        float epsilon;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k, values.v, values.log_decay, values.key_padding, values.states, values.normalisers,
            values.y, values.T, values.H, values.DK, values.DV, values.gate_shift, values.normalise, values.scale,
            values.epsilon, nullptr, nullptr};
    }

    static std::array<void*, 18> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k, &arguments.v, &arguments.log_decay, &arguments.key_padding,
            &arguments.states, &arguments.normalisers, &arguments.y, &arguments.T, &arguments.H, &arguments.DK,
            &arguments.DV, &arguments.gate_shift, &arguments.normalise, &arguments.scale, &arguments.epsilon,
            &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const H = values.H;
        int64_t const B = values.B;
        int64_t const DV = values.DV;
        int64_t const T = values.T;
        int64_t const CHUNK = constants[0];
        int64_t const BLOCK_V = constants[1];
        return {cdiv(DV, BLOCK_V) * cdiv(T, CHUNK) * B * H, 1, 1};
    }
};

} // namespace edgeattn::bidirectional_linear_attention
