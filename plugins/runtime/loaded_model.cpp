#include "loaded_model.h"

#include "adapters.h"
#include "edgeattn/plugin_library.hpp"
#include "mapped_file.h"
#include "narrow_floats.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <filesystem>
#include <numeric>

namespace edgeattn
{
namespace
{

constexpr size_t kAlignment = 256; // what TensorRT asks of an address
constexpr size_t kMostBytes = size_t{1} << 48; // so that sums of sizes do not overflow

size_t width(DataType dtype)
{
    switch (dtype)
    {
    case DataType::kFloat32:
    case DataType::kInt32: return 4;
    case DataType::kFloat16:
    case DataType::kBfloat16: return 2;
    case DataType::kInt64: return 8;
    default: return 1; // int8, bool; any other is refused when the engine is loaded
    }
}

Shape to_shape(Dims const& dims)
{
    return {dims.sizes, dims.sizes + std::clamp(dims.rank, 0, kMostDimensions)};
}

Dims to_dims(Shape const& shape)
{
    Dims dims{static_cast<int32_t>(shape.size()), {}};
    std::copy(shape.begin(), shape.end(), dims.sizes);
    return dims;
}

bool within(Shape const& shape, Shape const& low, Shape const& high)
{
    bool fits = shape.size() == low.size() && shape.size() == high.size();
    for (size_t i = 0; fits && i < shape.size(); ++i)
    {
        fits = low[i] <= shape[i] && shape[i] <= high[i];
    }
    return fits;
}

[[noreturn]] void wrong_type(Tensor const& tensor, std::string const& expected)
{
    throw Error(ErrorCode::kBundle, tensor.name + " of the graph to be of type " + expected, "it is another",
        "export the bundle again with this edgeattn");
}

[[noreturn]] void wrong_shape(Tensor const& tensor)
{
    throw Error(ErrorCode::kBundle, tensor.name + " of the graph to begin with the batch", "its shape is not told",
        "export the bundle again with this edgeattn");
}

template <typename Value, typename From, typename Convert>
std::vector<unsigned char> encoded(From const* values, size_t count, Convert convert)
{
    std::vector<unsigned char> raw(count * sizeof(Value));
    for (size_t i = 0; i < count; ++i)
    {
        Value const value = convert(values[i]);
        std::memcpy(raw.data() + i * sizeof value, &value, sizeof value);
    }
    return raw;
}

template <typename Value, typename Convert>
std::vector<float> decoded(std::vector<unsigned char> const& raw, Convert convert)
{
    std::vector<float> values(raw.size() / sizeof(Value));
    for (size_t i = 0; i < values.size(); ++i)
    {
        Value value;
        std::memcpy(&value, raw.data() + i * sizeof value, sizeof value);
        values[i] = convert(value);
    }
    return values;
}

} // namespace

size_t bytes_of(DataType dtype, Shape const& shape)
{
    size_t bytes = width(dtype);
    for (int64_t size : shape)
    {
        if (size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes) || bytes > kMostBytes)
        {
            throw Error(ErrorCode::kBundle, "tensors that a GPU can hold", "one has the shape " + to_string(shape),
                "export the bundle again, or build its engine for smaller sizes");
        }
    }
    return bytes;
}

std::string to_string(Shape const& shape)
{
    std::string text;
    for (int64_t size : shape)
    {
        text += (text.empty() ? "" : ", ") + std::to_string(size);
    }
    return "[" + text + "]";
}

size_t Arena::plan(size_t bytes)
{
    size_t const begin = mBytes;
    mBytes += (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
}

void Arena::allocate(Gpu const& gpu)
{
    mMemory = gpu.allocate(mBytes);
}

Gpu::Address Arena::at(size_t offset) const
{
    return *mMemory + offset;
}

LoadedModel::LoadedModel(Bundle const& bundle, std::string const& named)
    : mGpu(std::make_unique<Gpu>())
{
    Gpu::Current const current(*mGpu);
    std::optional<Error> newest;
    for (Engine const& engine : engines_for(bundle, mGpu->sm(), processor(), named))
    {
        try
        {
            load(bundle, engine);
            return;
        }
        catch (Error const& refusal) // another TensorRT may have built it
        {
            newest = newest ? newest : refusal;
        }
    }
    throw *newest;
}

void LoadedModel::load(Bundle const& bundle, Engine const& engine)
{
    mName = std::filesystem::path(engine.path).filename().string();
    if (engine.record.stripped)
    {
        throw Error(ErrorCode::kLowering, "an engine with its weights", mName + " was built without them",
            "build it without --strip-weights, or run it from Python");
    }
    std::optional<PluginRecord> const& plugins = engine.record.plugins;
    std::error_code error; // then it stays as it is
    std::filesystem::path const file = plugins ? std::filesystem::path(bundle.path) / plugins->file : "";
    std::filesystem::path const whole = std::filesystem::absolute(file, error);
    std::string const library = error ? file.string() : whole.string();
    MappedFile const content(engine.path);
    EngineRequest const request{content.data(), content.bytes(), engine.record.tensorrt.c_str(),
        plugins ? library.c_str() : nullptr, mGpu->stream()};
    mEngine = {load_engine(engine.record.flavour, request), Release{mGpu.get()}};
    mGpu->synchronize();
    for (int32_t i = 0; i < mEngine->tensors(); ++i)
    {
        char const* const name = mEngine->name(i);
        mTensors.push_back({name, mEngine->dtype(name), mEngine->is_input(name), to_shape(mEngine->shape(name))});
        if (mTensors.back().shape.empty())
        {
            wrong_shape(mTensors.back());
        }
        if (mTensors.back().dtype == DataType::kOther)
        {
            wrong_type(mTensors.back(), "fp32, fp16, bf16, int8, int32, int64 or bool");
        }
    }
}

void LoadedModel::Release::operator()(LoadedEngine* engine) const noexcept
{
    try
    {
        Gpu::Current const current(*gpu);
        engine->release();
    }
    catch (...)
    {
        // A context that cannot be entered is lost with all its memory.
    }
}

Tensor const* LoadedModel::find(std::string const& name) const
{
    auto const found
        = std::find_if(mTensors.begin(), mTensors.end(), [&](Tensor const& tensor) { return tensor.name == name; });
    return found == mTensors.end() ? nullptr : &*found;
}

int32_t LoadedModel::profiles() const
{
    return mEngine->profiles();
}

std::map<std::string, Shape> LoadedModel::largest_inputs(int32_t profile) const
{
    std::map<std::string, Shape> shapes;
    for (Tensor const& tensor : mTensors)
    {
        if (tensor.is_input)
        {
            shapes[tensor.name] = to_shape(mEngine->bound(tensor.name.c_str(), profile, Bound::kLargest));
        }
    }
    return shapes;
}

std::map<std::string, size_t> LoadedModel::plan(
    Arena& arena, std::set<std::string> const& names, std::optional<int64_t> rows)
{
    std::map<std::string, size_t> most, offsets;
    for (int32_t profile = 0; profile < profiles(); ++profile)
    {
        std::map<std::string, Shape> shapes = largest_inputs(profile);
        for (auto& [name, shape] : shapes)
        {
            shape.at(0) = rows.value_or(shape.at(0));
        }
        set_shapes(profile, shapes);
        for (Tensor const& tensor : mTensors)
        {
            if (names.count(tensor.name))
            {
                Shape const shape = tensor.is_input ? shapes.at(tensor.name) : output_shape(profile, tensor.name);
                if (shape.size() != tensor.shape.size())
                {
                    wrong_shape(tensor);
                }
                most[tensor.name] = std::max(most[tensor.name], bytes_of(tensor.dtype, shape));
            }
        }
    }
    for (auto const& [name, bytes] : most)
    {
        offsets[name] = arena.plan(bytes);
    }
    return offsets;
}

int32_t LoadedModel::choose_profile(std::map<std::string, Shape> const& shapes, std::string const& of) const
{
    int32_t chosen = -1;
    int64_t narrowest = INT64_MAX;
    for (int32_t profile = 0; profile < profiles(); ++profile)
    {
        std::map<std::string, Shape> const high = largest_inputs(profile);
        bool const fits = std::all_of(shapes.begin(), shapes.end(), [&](auto const& shape) {
            Dims const low = mEngine->bound(shape.first.c_str(), profile, Bound::kSmallest);
            return within(shape.second, to_shape(low), high.at(shape.first));
        });
        Shape const& most = high.at(of);
        int64_t const size = std::accumulate(most.begin(), most.end(), int64_t{1}, std::multiplies<>());
        if (fits && size < narrowest)
        {
            chosen = profile;
            narrowest = size;
        }
    }
    if (chosen < 0)
    {
        std::string sizes;
        int told = 0;
        for (auto shape = shapes.begin(); shape != shapes.end() && told < 3; ++shape, ++told)
        {
            sizes += (told ? ", " : "") + shape->first + " " + to_string(shape->second);
        }
        throw Error(ErrorCode::kLowering, "shapes within an optimisation profile of " + mName, "they are " + sizes,
            "give less at once, or build with other sizes: edgeattn build --profile");
    }
    return chosen;
}

void LoadedModel::set_shapes(int32_t profile, std::map<std::string, Shape> const& shapes)
{
    for (auto const& [name, shape] : shapes)
    {
        if (!mEngine->set_shape(profile, name.c_str(), to_dims(shape)))
        {
            refuse("take " + name + " of shape " + to_string(shape), "report this graph");
        }
    }
}

Shape LoadedModel::output_shape(int32_t profile, std::string const& output) const
{
    return to_shape(mEngine->output_shape(profile, output.c_str()));
}

void LoadedModel::bind(int32_t profile, std::string const& name, Gpu::Address address)
{
    if (!mEngine->bind(profile, name.c_str(), address))
    {
        refuse("take memory for " + name, "report this graph");
    }
}

void LoadedModel::run(int32_t profile)
{
    if (!mEngine->enqueue(profile, mGpu->stream()))
    {
        refuse("run the engine", "free memory on the GPU; if that does not help, report it");
    }
}

std::shared_ptr<Recording const> LoadedModel::record(int32_t profile)
{
    return mGpu->record([&] { return mEngine->enqueue(profile, mGpu->stream()); });
}

std::vector<unsigned char> LoadedModel::encode(Tensor const& tensor, std::vector<int64_t> const& values)
{
    switch (tensor.dtype)
    {
    case DataType::kInt64: return encoded<int64_t>(values.data(), values.size(), [](int64_t value) { return value; });
    case DataType::kInt32:
        return encoded<int32_t>(values.data(), values.size(), [](int64_t value) { return static_cast<int32_t>(value); });
    default: wrong_type(tensor, "int64 or int32");
    }
}

std::vector<unsigned char> LoadedModel::encode(Tensor const& tensor, float const* values, size_t count)
{
    switch (tensor.dtype)
    {
    case DataType::kFloat32: return encoded<float>(values, count, [](float value) { return value; });
    case DataType::kFloat16: return encoded<uint16_t>(values, count, to_float16);
    case DataType::kBfloat16: return encoded<uint16_t>(values, count, to_bfloat16);
    default: wrong_type(tensor, "fp32, fp16 or bf16");
    }
}

std::vector<float> LoadedModel::decode(Tensor const& tensor, std::vector<unsigned char> const& raw)
{
    switch (tensor.dtype)
    {
    case DataType::kFloat32: return decoded<float>(raw, [](float value) { return value; });
    case DataType::kFloat16: return decoded<uint16_t>(raw, from_float16);
    case DataType::kBfloat16: return decoded<uint16_t>(raw, from_bfloat16);
    default: wrong_type(tensor, "fp32, fp16 or bf16");
    }
}

void LoadedModel::refuse(std::string const& what, std::string const& todo) const
{
    std::string const message = mEngine->message();
    throw Error(ErrorCode::kLowering, std::string(mEngine->title()) + " to " + what + " (" + mName + ")",
        message.empty() ? "it gives no reason" : "it says: " + message, todo, message);
}

} // namespace edgeattn
