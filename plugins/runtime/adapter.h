//! What the session asks of TensorRT. The vtables of TensorRT's runtime, engine and context differ between its majors,
//! so a library of its own implements this for each (`adapter/tensorrt.cpp`, built as libedgeattn_trt10, _trt11 and
//! _rtx). What crosses the boundary has one layout with every compiler: virtual functions, plain structures.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgeattn
{

//! Rises with every change of what stands below.
constexpr int32_t kAdapterAbi = 1;
constexpr int32_t kMostDimensions = 8;

enum class DataType : int32_t
{
    kOther,
    kFloat32,
    kFloat16,
    kBfloat16,
    kInt8,
    kInt32,
    kInt64,
    kBool,
};

//! Which shape of an optimisation profile.
enum class Bound : int32_t
{
    kSmallest,
    kLargest,
};

//! A shape; in an engine's own, -1 is a size that a run decides.
struct Dims
{
    int32_t rank;
    int64_t sizes[kMostDimensions];
};

//! An engine to load. TensorRT reads the content before the call returns.
struct EngineRequest
{
    void const* content;
    size_t bytes;
    char const* version; //!< of the TensorRT that built it, as "10.3.0"
    char const* plugins; //!< path of the plugin library, null without one
    void* stream;        //!< CUstream on which it will run
};

//! Why an engine was not loaded: what an Error holds.
struct Refusal
{
    int32_t code;
    char sentence[4096];
    char tensorrt[2048];
};

//! An engine with an execution context for each optimisation profile, for one thread at a time. The primary context of
//! the GPU must be current in every call. Where a function returns false, `message` says why.
class LoadedEngine
{
public:
    //! Frees the engine.
    virtual void release() noexcept = 0;

    //! TensorRT's name and version, for errors.
    virtual char const* title() const noexcept = 0;

    //! TensorRT's last error message, empty before the first.
    virtual char const* message() noexcept = 0;

    virtual int32_t tensors() const noexcept = 0;
    virtual char const* name(int32_t tensor) const noexcept = 0;
    virtual bool is_input(char const* name) const noexcept = 0;
    virtual DataType dtype(char const* name) const noexcept = 0;
    virtual Dims shape(char const* name) const noexcept = 0;

    virtual int32_t profiles() const noexcept = 0;
    virtual Dims bound(char const* input, int32_t profile, Bound bound) const noexcept = 0;

    virtual bool set_shape(int32_t profile, char const* input, Dims const& shape) noexcept = 0;
    //! Of an output, once all inputs have shapes.
    virtual Dims output_shape(int32_t profile, char const* output) const noexcept = 0;
    virtual bool bind(int32_t profile, char const* name, uint64_t address) noexcept = 0;
    //! Puts a run behind what a CUstream does already.
    virtual bool enqueue(int32_t profile, void* stream) noexcept = 0;

protected:
    ~LoadedEngine() = default;
};

//! What an adapter exports, as `edgeattnLoadEngine`: loads an engine, or says in the refusal why not and returns null.
//! The driver must have been initialised.
using LoadEngine = LoadedEngine*(int32_t adapter_abi, EngineRequest const* request, Refusal* refusal) noexcept;

} // namespace edgeattn
