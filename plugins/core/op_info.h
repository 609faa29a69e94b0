//! What generated/<op>.h says about an operator: its dossier (edgeattn/ops/<op>.py) in C++.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace edgeattn
{

enum class Dtype : int32_t
{
    kFP32,
    kFP16,
    kBF16,
    kINT32,
    kINT8,
    kBOOL,
};

//! As the dossiers and the table of variants spell it.
char const* nameOf(Dtype dtype) noexcept;

//! An array of somebody else, mostly of the library.
template <typename T>
struct View
{
    T const* data{nullptr};
    int32_t size{0};

    constexpr View() = default;

    template <size_t N>
    constexpr View(T const (&array)[N])
        : data(array)
        , size(static_cast<int32_t>(N))
    {
    }

    template <size_t N>
    constexpr View(std::array<T, N> const& array)
        : data(array.data())
        , size(static_cast<int32_t>(N))
    {
    }

    constexpr View(T const* first, int32_t count)
        : data(first)
        , size(count)
    {
    }

    constexpr T const* begin() const
    {
        return data;
    }

    constexpr T const* end() const
    {
        return data + size;
    }

    constexpr T const& operator[](int32_t i) const
    {
        return data[i];
    }
};

constexpr int32_t kMAX_SYMBOLS = 16;

//! Sizes behind the symbols of an operator's shapes, in the order of OpInfo::symbols; -1 where not known. Behind them
//! are the dtypes of OpInfo::choices.
using Sizes = std::array<int32_t, kMAX_SYMBOLS>;

//! As DimInfo::size: of a symbol for any number of dimensions, whose size is their product.
constexpr int32_t kLEADING = -1;

//! One dimension of a tensor: a symbol, or a size that is always the same.
struct DimInfo
{
    int32_t symbol; //!< index in OpInfo::symbols, or -1
    int32_t size;   //!< where it is no symbol; kLEADING, in the first dimension only
};

struct TensorInfo
{
    char const* name;
    //! Tensors of one type variable have one dtype; the kernels are compiled for that of "T". A variable with a choice,
    //! part of which is that of "T", has the dtype of "T" or another.
    char const* variable;
    View<Dtype> dtypes;
    View<DimInfo> shape;
    int32_t updates; //!< of an output: the input whose next value it is, or -1
};

struct OpInfo
{
    char const* name;
    char const* version;
    char const* pluginNamespace;
    char const* kernels; //!< how the names of its kernels start, with the dot
    View<char const*> symbols;
    View<TensorInfo> inputs;
    View<TensorInfo> outputs;
    View<char const*> choices{}; //!< type variables with a choice, but "T"
};

} // namespace edgeattn
