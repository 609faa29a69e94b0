//! Written from kernels/recurrent_linear_attention.py by edgeattn.kernels.cpp_header; not to be edited.
#pragma once

#include "core/kernel.h"

namespace edgeattn::recurrent_linear_attention
{

struct Decode
{
    static constexpr char const* kNAME = "recurrent_linear_attention.decode";
    static constexpr char const* kSIGNATURE
        = "q *T, k *T, v *T, log_decay *fp32, beta *fp32, past_state *fp32, past_normaliser *fp32, y *T, "
          "present_state *fp32, present_normaliser *fp32, T i32, H i32, HKV i32, DK i32, DV i32, DG i32, delta i32, "
          "normalise i32, scale fp32, epsilon fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"BLOCK_V"};

    struct Arguments
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
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k, values.v, values.log_decay, values.beta, values.past_state, values.past_normaliser,
            values.y, values.present_state, values.present_normaliser, values.T, values.H, values.HKV, values.DK,
            values.DV, values.DG, values.delta, values.normalise, values.scale, values.epsilon, nullptr, nullptr};
    }

    static std::array<void*, 22> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k, &arguments.v, &arguments.log_decay, &arguments.beta, &arguments.past_state,
            &arguments.past_normaliser, &arguments.y, &arguments.present_state, &arguments.present_normaliser,
            &arguments.T, &arguments.H, &arguments.HKV, &arguments.DK, &arguments.DV, &arguments.DG, &arguments.delta,
            &arguments.normalise, &arguments.scale, &arguments.epsilon, &arguments.globalScratch,
            &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const DV = values.DV;
        int64_t const BLOCK_V = constants[0];
        return {cdiv(DV, BLOCK_V) * B * HKV, 1, 1};
    }
};

struct Prepare
{
    static constexpr char const* kNAME = "recurrent_linear_attention.prepare";
    static constexpr char const* kSIGNATURE
        = "k *T, v *T, log_decay *fp32, beta *fp32, u *fp32, w *fp32, T i32, HKV i32, DK i32, DV i32, DG i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"CHUNK"};

    struct Arguments
    {
        void const* k;
        void const* v;
        float const* log_decay;
        float const* beta;
        float const* u;
        float const* w;
        int32_t T;
        int32_t HKV;
        int32_t DK;
        int32_t DV;
        int32_t DG;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.k, values.v, values.log_decay, values.beta, values.u, values.w, values.T, values.HKV, values.DK,
            values.DV, values.DG, nullptr, nullptr};
    }

    static std::array<void*, 13> addresses(Arguments& arguments)
    {
        return {&arguments.k, &arguments.v, &arguments.log_decay, &arguments.beta, &arguments.u, &arguments.w,
            &arguments.T, &arguments.HKV, &arguments.DK, &arguments.DV, &arguments.DG, &arguments.globalScratch,
            &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const T = values.T;
        int64_t const CHUNK = constants[0];
        return {cdiv(T, CHUNK) * B * HKV, 1, 1};
    }
};

struct States
{
    static constexpr char const* kNAME = "recurrent_linear_attention.states";
    static constexpr char const* kSIGNATURE
        = "k *T, v *T, log_decay *fp32, u *fp32, w *fp32, past_state *fp32, past_normaliser *fp32, states *fp32, "
          "normalisers *fp32, present_state *fp32, present_normaliser *fp32, T i32, HKV i32, DK i32, DV i32, DG i32, "
          "delta i32, normalise i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"BLOCK_V"};

    struct Arguments
    {
        void const* k;
        void const* v;
        float const* log_decay;
        float const* u;
        float const* w;
        float const* past_state;
        float const* past_normaliser;
        float const* states;
        float const* normalisers;
        float const* present_state;
        float const* present_normaliser;
        int32_t T;
        int32_t HKV;
        int32_t DK;
        int32_t DV;
        int32_t DG;
        int32_t delta;
        int32_t normalise;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.k, values.v, values.log_decay, values.u, values.w, values.past_state, values.past_normaliser,
            values.states, values.normalisers, values.present_state, values.present_normaliser, values.T, values.HKV,
            values.DK, values.DV, values.DG, values.delta, values.normalise, nullptr, nullptr};
    }

    static std::array<void*, 20> addresses(Arguments& arguments)
    {
        return {&arguments.k, &arguments.v, &arguments.log_decay, &arguments.u, &arguments.w, &arguments.past_state,
            &arguments.past_normaliser, &arguments.states, &arguments.normalisers, &arguments.present_state,
            &arguments.present_normaliser, &arguments.T, &arguments.HKV, &arguments.DK, &arguments.DV, &arguments.DG,
            &arguments.delta, &arguments.normalise, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const DV = values.DV;
        int64_t const BLOCK_V = constants[0];
        return {cdiv(DV, BLOCK_V) * B * HKV, 1, 1};
    }
};

struct Outputs
{
    static constexpr char const* kNAME = "recurrent_linear_attention.outputs";
    static constexpr char const* kSIGNATURE
        = "q *T, k *T, v *T, log_decay *fp32, u *fp32, states *fp32, normalisers *fp32, y *T, T i32, H i32, HKV i32, "
          "DK i32, DV i32, DG i32, delta i32, normalise i32, scale fp32, epsilon fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 2>;
    static constexpr std::array<char const*, 2> kGRID_CONSTANTS{"CHUNK", "BLOCK_V"};

    struct Arguments
    {
        void const* q;
        void const* k;
        void const* v;
        float const* log_decay;
        float const* u;
        float const* states;
        float const* normalisers;
        void const* y;
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
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k, values.v, values.log_decay, values.u, values.states, values.normalisers, values.y,
            values.T, values.H, values.HKV, values.DK, values.DV, values.DG, values.delta, values.normalise,
            values.scale, values.epsilon, nullptr, nullptr};
    }

    static std::array<void*, 20> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k, &arguments.v, &arguments.log_decay, &arguments.u, &arguments.states,
            &arguments.normalisers, &arguments.y, &arguments.T, &arguments.H, &arguments.HKV, &arguments.DK,
            &arguments.DV, &arguments.DG, &arguments.delta, &arguments.normalise, &arguments.scale, &arguments.epsilon,
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

} // namespace edgeattn::recurrent_linear_attention
