//! An engine that is loaded: tensors, memory and runs, whatever the model is; as edgeattn/engine/loaded.py.
#pragma once

#include "adapter.h"
#include "edgeattn/engine.hpp"
#include "gpu.h"

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace edgeattn
{

using Shape = std::vector<int64_t>;

//! An input or output of an engine.
struct Tensor
{
    std::string name;
    DataType dtype;
    bool is_input;
    Shape shape; //!< -1 is a size that a run decides
};

//! Bytes of a tensor of some shape.
size_t bytes_of(DataType dtype, Shape const& shape);

std::string to_string(Shape const& shape);

//! The GPU's memory of a session: pieces are planned, then allocated all at once.
class Arena
{
public:
    //! \return where the piece will begin.
    size_t plan(size_t bytes);
    void allocate(Gpu const& gpu);
    Gpu::Address at(size_t offset) const;
    size_t bytes() const
    {
        return mBytes;
    }

private:
    size_t mBytes = 0;
    std::shared_ptr<Gpu::Address const> mMemory;
};

//! An engine on the first GPU; for one thread at a time. Beside what is said, its functions throw Error kRuntimeInput
//! where the GPU fails and kLowering where TensorRT refuses.
class LoadedModel
{
public:
    //! Loads an engine of a bundle.
    //! \param named its path, empty for the newest that runs here.
    //! \throws Error kMissing: no GPU, no TensorRT, no adapter for it; see choose_engine for the others.
    LoadedModel(Bundle const& bundle, std::string const& named);

    Gpu const& gpu() const
    {
        return *mGpu;
    }

    std::vector<Tensor> const& tensors() const
    {
        return mTensors;
    }

    //! \return null when the engine has none of that name.
    Tensor const* find(std::string const& name) const;

    int32_t profiles() const;
    //! The largest shapes of all inputs by name.
    std::map<std::string, Shape> largest_inputs(int32_t profile) const;

    //! Plans memory for tensors, as much as any profile can ask for.
    //! \param names of inputs and outputs; those the engine has not are left out.
    //! \param rows of all shapes, none for as many as the engine was built for.
    //! \return where each begins.
    std::map<std::string, size_t> plan(
        Arena& arena, std::set<std::string> const& names, std::optional<int64_t> rows = std::nullopt);

    //! The optimisation profile that holds these shapes of all inputs and is narrowest in the input `of`.
    //! \throws Error kLowering: none does.
    int32_t choose_profile(std::map<std::string, Shape> const& shapes, std::string const& of) const;

    //! Tells a profile's context the shapes of the inputs.
    void set_shapes(int32_t profile, std::map<std::string, Shape> const& shapes);
    Shape output_shape(int32_t profile, std::string const& output) const;
    void bind(int32_t profile, std::string const& name, Gpu::Address address);

    //! Runs the engine, or replays it where `recording` holds a run of the same shapes and addresses.
    void run(int32_t profile);
    //! A run for `Gpu::replay`, null where it cannot be recorded.
    std::shared_ptr<Recording const> record(int32_t profile);

    //! Whole numbers for an input, in its own type.
    //! \throws Error kBundle: the graph reads another type there.
    static std::vector<unsigned char> encode(Tensor const& tensor, std::vector<int64_t> const& values);
    //! Finite numbers for an input, rounded to its own type.
    static std::vector<unsigned char> encode(Tensor const& tensor, float const* values, size_t count);
    //! An output's values in fp32. \throws Error kBundle: the graph gives another type there.
    static std::vector<float> decode(Tensor const& tensor, std::vector<unsigned char> const& raw);

private:
    void load(Bundle const& bundle, Engine const& engine);
    [[noreturn]] void refuse(std::string const& what, std::string const& todo) const;

    struct Release
    {
        Gpu const* gpu;
        void operator()(LoadedEngine* engine) const noexcept;
    };

    std::unique_ptr<Gpu> mGpu;
    std::string mName;
    std::unique_ptr<LoadedEngine, Release> mEngine;
    std::vector<Tensor> mTensors;
};

} // namespace edgeattn
