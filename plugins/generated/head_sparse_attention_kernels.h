//! Written from kernels/head_sparse_attention.py by edgeattn.kernels.cpp_header; not to be edited.
#pragma once

#include "core/kernel.h"

namespace edgeattn::head_sparse_attention
{

struct Decode
{
    static constexpr char const* kNAME = "head_sparse_attention.decode";
    static constexpr char const* kSIGNATURE
        = "q *T, k_cache *T, v_cache *T, k_scale *fp32, v_scale *fp32, head_index *i32, kv_len *i32, means *fp32, "
          "weights *fp32, HKV i32, G i32, S i32, D i32, K i32, SPLITS i32, groups i32, scale fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"MEMBERS"};

    struct Arguments
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
        int32_t HKV;
        int32_t G;
        int32_t S;
        int32_t D;
        int32_t K;
        int32_t SPLITS;
        int32_t groups;
        float scale;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k_cache, values.v_cache, values.k_scale, values.v_scale, values.head_index,
            values.kv_len, values.means, values.weights, values.HKV, values.G, values.S, values.D, values.K,
            values.SPLITS, values.groups, values.scale, nullptr, nullptr};
    }

    static std::array<void*, 19> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k_cache, &arguments.v_cache, &arguments.k_scale, &arguments.v_scale,
            &arguments.head_index, &arguments.kv_len, &arguments.means, &arguments.weights, &arguments.HKV,
            &arguments.G, &arguments.S, &arguments.D, &arguments.K, &arguments.SPLITS, &arguments.groups,
            &arguments.scale, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const SPLITS = values.SPLITS;
        int64_t const G = values.G;
        int64_t const MEMBERS = constants[0];
        return {cdiv(G, MEMBERS) * SPLITS * B * HKV, 1, 1};
    }
};

struct DecodeInt8
{
    static constexpr char const* kNAME = "head_sparse_attention.decode_int8";
    static constexpr char const* kSIGNATURE
        = "q *T, k_cache *i8, v_cache *i8, k_scale *fp32, v_scale *fp32, head_index *i32, kv_len *i32, means *fp32, "
          "weights *fp32, HKV i32, G i32, S i32, D i32, K i32, SPLITS i32, groups i32, scale fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"MEMBERS"};

    struct Arguments
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
        int32_t HKV;
        int32_t G;
        int32_t S;
        int32_t D;
        int32_t K;
        int32_t SPLITS;
        int32_t groups;
        float scale;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k_cache, values.v_cache, values.k_scale, values.v_scale, values.head_index,
            values.kv_len, values.means, values.weights, values.HKV, values.G, values.S, values.D, values.K,
            values.SPLITS, values.groups, values.scale, nullptr, nullptr};
    }

    static std::array<void*, 19> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k_cache, &arguments.v_cache, &arguments.k_scale, &arguments.v_scale,
            &arguments.head_index, &arguments.kv_len, &arguments.means, &arguments.weights, &arguments.HKV,
            &arguments.G, &arguments.S, &arguments.D, &arguments.K, &arguments.SPLITS, &arguments.groups,
            &arguments.scale, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const SPLITS = values.SPLITS;
        int64_t const G = values.G;
        int64_t const MEMBERS = constants[0];
        return {cdiv(G, MEMBERS) * SPLITS * B * HKV, 1, 1};
    }
};

struct Reduce
{
    static constexpr char const* kNAME = "head_sparse_attention.reduce";
    static constexpr char const* kSIGNATURE
        = "head_index *i32, kv_len *i32, means *fp32, weights *fp32, y *T, error_count *i32, HKV i32, G i32, S i32, "
          "D i32, K i32, SPLITS i32, groups i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"BLOCK"};

    struct Arguments
    {
        int32_t const* head_index;
        int32_t const* kv_len;
        float const* means;
        float const* weights;
        void const* y;
        int32_t const* error_count;
        int32_t HKV;
        int32_t G;
        int32_t S;
        int32_t D;
        int32_t K;
        int32_t SPLITS;
        int32_t groups;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.head_index, values.kv_len, values.means, values.weights, values.y, values.error_count,
            values.HKV, values.G, values.S, values.D, values.K, values.SPLITS, values.groups, nullptr, nullptr};
    }

    static std::array<void*, 15> addresses(Arguments& arguments)
    {
        return {&arguments.head_index, &arguments.kv_len, &arguments.means, &arguments.weights, &arguments.y,
            &arguments.error_count, &arguments.HKV, &arguments.G, &arguments.S, &arguments.D, &arguments.K,
            &arguments.SPLITS, &arguments.groups, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const G = values.G;
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const D = values.D;
        int64_t const BLOCK = constants[0];
        return {cdiv(D, BLOCK) * B * HKV * G, 1, 1};
    }
};

struct Prefill
{
    static constexpr char const* kNAME = "head_sparse_attention.prefill";
    static constexpr char const* kSIGNATURE
        = "q *T, k_cache *T, v_cache *T, k_scale *fp32, v_scale *fp32, head_index *i32, kv_len *i32, y *T, "
          "error_count *i32, T i32, HKV i32, G i32, S i32, D i32, K i32, groups i32, scale fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"CHUNK"};

    struct Arguments
    {
        void const* q;
        void const* k_cache;
        void const* v_cache;
        float const* k_scale;
        float const* v_scale;
        int32_t const* head_index;
        int32_t const* kv_len;
        void const* y;
        int32_t const* error_count;
        int32_t T;
        int32_t HKV;
        int32_t G;
        int32_t S;
        int32_t D;
        int32_t K;
        int32_t groups;
        float scale;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k_cache, values.v_cache, values.k_scale, values.v_scale, values.head_index,
            values.kv_len, values.y, values.error_count, values.T, values.HKV, values.G, values.S, values.D, values.K,
            values.groups, values.scale, nullptr, nullptr};
    }

    static std::array<void*, 19> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k_cache, &arguments.v_cache, &arguments.k_scale, &arguments.v_scale,
            &arguments.head_index, &arguments.kv_len, &arguments.y, &arguments.error_count, &arguments.T,
            &arguments.HKV, &arguments.G, &arguments.S, &arguments.D, &arguments.K, &arguments.groups, &arguments.scale,
            &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const G = values.G;
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const T = values.T;
        int64_t const CHUNK = constants[0];
        return {cdiv(T, CHUNK) * B * HKV * G, 1, 1};
    }
};

struct PrefillInt8
{
    static constexpr char const* kNAME = "head_sparse_attention.prefill_int8";
    static constexpr char const* kSIGNATURE
        = "q *T, k_cache *i8, v_cache *i8, k_scale *fp32, v_scale *fp32, head_index *i32, kv_len *i32, y *T, "
          "error_count *i32, T i32, HKV i32, G i32, S i32, D i32, K i32, groups i32, scale fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"CHUNK"};

    struct Arguments
    {
        void const* q;
        void const* k_cache;
        void const* v_cache;
        float const* k_scale;
        float const* v_scale;
        int32_t const* head_index;
        int32_t const* kv_len;
        void const* y;
        int32_t const* error_count;
        int32_t T;
        int32_t HKV;
        int32_t G;
        int32_t S;
        int32_t D;
        int32_t K;
        int32_t groups;
        float scale;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k_cache, values.v_cache, values.k_scale, values.v_scale, values.head_index,
            values.kv_len, values.y, values.error_count, values.T, values.HKV, values.G, values.S, values.D, values.K,
            values.groups, values.scale, nullptr, nullptr};
    }

    static std::array<void*, 19> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k_cache, &arguments.v_cache, &arguments.k_scale, &arguments.v_scale,
            &arguments.head_index, &arguments.kv_len, &arguments.y, &arguments.error_count, &arguments.T,
            &arguments.HKV, &arguments.G, &arguments.S, &arguments.D, &arguments.K, &arguments.groups, &arguments.scale,
            &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const G = values.G;
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const T = values.T;
        int64_t const CHUNK = constants[0];
        return {cdiv(T, CHUNK) * B * HKV * G, 1, 1};
    }
};

} // namespace edgeattn::head_sparse_attention
