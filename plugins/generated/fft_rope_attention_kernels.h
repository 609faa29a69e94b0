//! Written from kernels/fft_rope_attention.py by edgeattn.kernels.cpp_header; not to be edited.
#pragma once

#include "core/kernel.h"

namespace edgeattn::fft_rope_attention
{

struct States
{
    static constexpr char const* kNAME = "fft_rope_attention.states";
    static constexpr char const* kSIGNATURE
        = "k *T, v *T, key_mean *fp32, backend *i32, kv_len *i32, sums *fp32, peaks *fp32, shift *fp32, HKV i32, G "
          "i32, S i32, D i32, LEVELS i32, SEGMENT i32, SEGMENTS i32, sink i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 0>;
    static constexpr std::array<char const*, 0> kGRID_CONSTANTS{};

    struct Arguments
    {
        void const* k;
        void const* v;
        float const* key_mean;
        int32_t const* backend;
        int32_t const* kv_len;
        float const* sums;
        float const* peaks;
        float const* shift;
        int32_t HKV;
        int32_t G;
        int32_t S;
        int32_t D;
        int32_t LEVELS;
        int32_t SEGMENT;
        int32_t SEGMENTS;
        int32_t sink;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.k, values.v, values.key_mean, values.backend, values.kv_len, values.sums, values.peaks,
            values.shift, values.HKV, values.G, values.S, values.D, values.LEVELS, values.SEGMENT, values.SEGMENTS,
            values.sink, nullptr, nullptr};
    }

    static std::array<void*, 18> addresses(Arguments& arguments)
    {
        return {&arguments.k, &arguments.v, &arguments.key_mean, &arguments.backend, &arguments.kv_len, &arguments.sums,
            &arguments.peaks, &arguments.shift, &arguments.HKV, &arguments.G, &arguments.S, &arguments.D,
            &arguments.LEVELS, &arguments.SEGMENT, &arguments.SEGMENTS, &arguments.sink, &arguments.globalScratch,
            &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const&)
    {
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const LEVELS = values.LEVELS;
        int64_t const SEGMENTS = values.SEGMENTS;
        return {LEVELS * SEGMENTS * B * HKV, 1, 1};
    }
};

struct Prefix
{
    static constexpr char const* kNAME = "fft_rope_attention.prefix";
    static constexpr char const* kSIGNATURE
        = "sums *fp32, D i32, LEVELS i32, SEGMENTS i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"NUMBERS"};

    struct Arguments
    {
        float const* sums;
        int32_t D;
        int32_t LEVELS;
        int32_t SEGMENTS;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.sums, values.D, values.LEVELS, values.SEGMENTS, nullptr, nullptr};
    }

    static std::array<void*, 6> addresses(Arguments& arguments)
    {
        return {&arguments.sums, &arguments.D, &arguments.LEVELS, &arguments.SEGMENTS, &arguments.globalScratch,
            &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const D = values.D;
        int64_t const LEVELS = values.LEVELS;
        int64_t const NUMBERS = constants[0];
        return {cdiv((LEVELS * (D + 1) + 1) * D, NUMBERS) * B * HKV, 1, 1};
    }
};

struct Spectrum
{
    static constexpr char const* kNAME = "fft_rope_attention.spectrum";
    static constexpr char const* kSIGNATURE
        = "log_bias *fp32, backend *i32, spectra *fp32, norms *fp32, signals *fp32, TQ i32, S i32, D i32, HB i32, N "
          "i32, POINTS i32, window i32, causal i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 0>;
    static constexpr std::array<char const*, 0> kGRID_CONSTANTS{};

    struct Arguments
    {
        float const* log_bias;
        int32_t const* backend;
        float const* spectra;
        float const* norms;
        float const* signals;
        int32_t TQ;
        int32_t S;
        int32_t D;
        int32_t HB;
        int32_t N;
        int32_t POINTS;
        int32_t window;
        int32_t causal;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.log_bias, values.backend, values.spectra, values.norms, values.signals, values.TQ, values.S,
            values.D, values.HB, values.N, values.POINTS, values.window, values.causal, nullptr, nullptr};
    }

    static std::array<void*, 15> addresses(Arguments& arguments)
    {
        return {&arguments.log_bias, &arguments.backend, &arguments.spectra, &arguments.norms, &arguments.signals,
            &arguments.TQ, &arguments.S, &arguments.D, &arguments.HB, &arguments.N, &arguments.POINTS,
            &arguments.window, &arguments.causal, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const&)
    {
        int64_t const HKV = values.HKV;
        int64_t const G = values.G;
        return {HKV * G, 1, 1};
    }
};

struct Convolve
{
    static constexpr char const* kNAME = "fft_rope_attention.convolve";
    static constexpr char const* kSIGNATURE
        = "q *T, k *T, v *T, key_mean *fp32, backend *i32, kv_len *i32, spectra *fp32, signals *fp32, far_sums "
          "*fp32, HKV i32, G i32, TQ i32, S i32, D i32, C i32, POINTS i32, sink i32, scale fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 0>;
    static constexpr std::array<char const*, 0> kGRID_CONSTANTS{};

    struct Arguments
    {
        void const* q;
        void const* k;
        void const* v;
        float const* key_mean;
        int32_t const* backend;
        int32_t const* kv_len;
        float const* spectra;
        float const* signals;
        float const* far_sums;
        int32_t HKV;
        int32_t G;
        int32_t TQ;
        int32_t S;
        int32_t D;
        int32_t C;
        int32_t POINTS;
        int32_t sink;
        float scale;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k, values.v, values.key_mean, values.backend, values.kv_len, values.spectra,
            values.signals, values.far_sums, values.HKV, values.G, values.TQ, values.S, values.D, values.C,
            values.POINTS, values.sink, values.scale, nullptr, nullptr};
    }

    static std::array<void*, 20> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k, &arguments.v, &arguments.key_mean, &arguments.backend, &arguments.kv_len,
            &arguments.spectra, &arguments.signals, &arguments.far_sums, &arguments.HKV, &arguments.G, &arguments.TQ,
            &arguments.S, &arguments.D, &arguments.C, &arguments.POINTS, &arguments.sink, &arguments.scale,
            &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const&)
    {
        int64_t const G = values.G;
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const D = values.D;
        return {cdiv(D + 2, 2) * B * HKV * G, 1, 1};
    }
};

struct Attend
{
    static constexpr char const* kNAME = "fft_rope_attention.attend";
    static constexpr char const* kSIGNATURE
        = "q *T, k *T, v *T, coefficients *fp32, key_mean *fp32, log_bias *fp32, score_bound *fp32, backend *i32, "
          "kv_len *i32, sums *fp32, peaks *fp32, shift *fp32, far_sums *fp32, norms *fp32, y *T, fallbacks *fp32, "
          "HKV i32, G i32, TQ i32, S i32, D i32, C i32, HB i32, N i32, LEVELS i32, SEGMENT i32, SEGMENTS i32, POINTS "
          "i32, sink i32, window i32, causal i32, row_centre i32, scale fp32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 1>;
    static constexpr std::array<char const*, 1> kGRID_CONSTANTS{"CHUNK"};

    struct Arguments
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
        float const* sums;
        float const* peaks;
        float const* shift;
        float const* far_sums;
        float const* norms;
        void const* y;
        float const* fallbacks;
        int32_t HKV;
        int32_t G;
        int32_t TQ;
        int32_t S;
        int32_t D;
        int32_t C;
        int32_t HB;
        int32_t N;
        int32_t LEVELS;
        int32_t SEGMENT;
        int32_t SEGMENTS;
        int32_t POINTS;
        int32_t sink;
        int32_t window;
        int32_t causal;
        int32_t row_centre;
        float scale;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.q, values.k, values.v, values.coefficients, values.key_mean, values.log_bias, values.score_bound,
            values.backend, values.kv_len, values.sums, values.peaks, values.shift, values.far_sums, values.norms,
            values.y, values.fallbacks, values.HKV, values.G, values.TQ, values.S, values.D, values.C, values.HB,
            values.N, values.LEVELS, values.SEGMENT, values.SEGMENTS, values.POINTS, values.sink, values.window,
            values.causal, values.row_centre, values.scale, nullptr, nullptr};
    }

    static std::array<void*, 35> addresses(Arguments& arguments)
    {
        return {&arguments.q, &arguments.k, &arguments.v, &arguments.coefficients, &arguments.key_mean,
            &arguments.log_bias, &arguments.score_bound, &arguments.backend, &arguments.kv_len, &arguments.sums,
            &arguments.peaks, &arguments.shift, &arguments.far_sums, &arguments.norms, &arguments.y,
            &arguments.fallbacks, &arguments.HKV, &arguments.G, &arguments.TQ, &arguments.S, &arguments.D, &arguments.C,
            &arguments.HB, &arguments.N, &arguments.LEVELS, &arguments.SEGMENT, &arguments.SEGMENTS, &arguments.POINTS,
            &arguments.sink, &arguments.window, &arguments.causal, &arguments.row_centre, &arguments.scale,
            &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const& constants)
    {
        int64_t const G = values.G;
        int64_t const HKV = values.HKV;
        int64_t const B = values.B;
        int64_t const TQ = values.TQ;
        int64_t const CHUNK = constants[0];
        return {cdiv(TQ, CHUNK) * B * HKV * G, 1, 1};
    }
};

struct Count
{
    static constexpr char const* kNAME = "fft_rope_attention.count";
    static constexpr char const* kSIGNATURE
        = "fallbacks *fp32, fallback_count *i32, B i32, HKV i32, G i32, TQ i32";
    //! Those that the grid depends on.
    using GridConstants = std::array<int64_t, 0>;
    static constexpr std::array<char const*, 0> kGRID_CONSTANTS{};

    struct Arguments
    {
        float const* fallbacks;
        int32_t const* fallback_count;
        int32_t B;
        int32_t HKV;
        int32_t G;
        int32_t TQ;
        void* globalScratch;
        void* profileScratch;
    };

    //! From anything with members of these names.
    template <typename Values>
    static Arguments arguments(Values const& values)
    {
        return {values.fallbacks, values.fallback_count, values.B, values.HKV, values.G, values.TQ, nullptr, nullptr};
    }

    static std::array<void*, 8> addresses(Arguments& arguments)
    {
        return {&arguments.fallbacks, &arguments.fallback_count, &arguments.B, &arguments.HKV, &arguments.G,
            &arguments.TQ, &arguments.globalScratch, &arguments.profileScratch};
    }

    template <typename Values>
    static Grid grid(Values const& values, GridConstants const&)
    {
        int64_t const HKV = values.HKV;
        int64_t const G = values.G;
        return {HKV * G, 1, 1};
    }
};

} // namespace edgeattn::fft_rope_attention
