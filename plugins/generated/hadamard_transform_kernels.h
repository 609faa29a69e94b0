//! Written from kernels/hadamard_transform.py by edgeattn.kernels.cpp_header; not to be edited.
#pragma once

#include "core/kernel.h"

namespace edgeattn::hadamard_transform
{

struct Transform
{
    static constexpr char const* kNAME = "hadamard_transform.transform";
    static constexpr char const* kSIGNATURE
        = "x *T, left *T, right *T, y *T, L i32, K i32, M i32, TILE i32, scale fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"BLOCK_M"};

    struct Arguments
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
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.x, values.left, values.right, values.y, values.L, values.K, values.M, values.TILE, values.scale,
            nullptr, nullptr};
    }

    static std::array<void*, 11> addresses(Arguments& arguments)
    {
        return {&arguments.x, &arguments.left, &arguments.right, &arguments.y, &arguments.L, &arguments.K, &arguments.M,
            &arguments.TILE, &arguments.scale, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const M = values.M;
        int64_t const L = values.L;
        int64_t const TILE = values.TILE;
        int64_t const BLOCK_M = constants[0];
        return {cdiv(M, BLOCK_M) * cdiv(L, TILE), 1, 1};
    }
};

} // namespace edgeattn::hadamard_transform
