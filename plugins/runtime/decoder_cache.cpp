#include "decoder_cache.h"

#include <algorithm>
#include <climits>

namespace edgeattn
{
namespace
{

std::string const kPast = "past_key_values.";
std::string const kPresent = "present.";

bool begins(std::string const& text, std::string const& with)
{
    return text.compare(0, with.size(), with) == 0;
}

bool ends(std::string const& text, std::string const& with)
{
    return text.size() >= with.size() && text.compare(text.size() - with.size(), with.size(), with) == 0;
}

//! Slots of a static cache, where they are a number in the graph; else -1.
int64_t static_slots(LoadedModel const& model)
{
    for (Tensor const& tensor : model.tensors())
    {
        bool const is_cache = tensor.is_input && begins(tensor.name, kPast);
        if (is_cache && (ends(tensor.name, ".key") || ends(tensor.name, ".value")) && tensor.shape.size() > 2)
        {
            return tensor.shape[2];
        }
    }
    return -1;
}

//! The most slots that a profile of the engine holds; states alone have no such number.
int64_t most_slots(LoadedModel const& model)
{
    int64_t most = 0;
    for (int32_t profile = 0; profile < model.profiles(); ++profile)
    {
        std::map<std::string, Shape> const largest = model.largest_inputs(profile);
        auto const mask = largest.find("attention_mask");
        if (mask != largest.end())
        {
            most = std::max(most, mask->second.back());
        }
    }
    return most > 0 ? most : INT64_MAX;
}

Shape with_slots(Shape shape, int64_t slots)
{
    std::replace(shape.begin(), shape.end(), int64_t{-1}, slots);
    return shape;
}

} // namespace

DecoderCache::DecoderCache(LoadedModel const& model, int64_t rows, int64_t context, Arena& arena)
    : mCapacity(static_slots(model))
    , mStatic(mCapacity >= 0)
{
    mCapacity = mStatic ? mCapacity : std::min(context, most_slots(model));
    for (Tensor const& tensor : model.tensors())
    {
        if (!tensor.is_input || !begins(tensor.name, kPast))
        {
            continue;
        }
        Entry entry{tensor.name, kPresent + tensor.name.substr(kPast.size()), tensor.shape, 0, {}};
        Tensor const* const present = model.find(entry.present);
        if (!present || present->is_input || present->dtype != tensor.dtype || present->shape != tensor.shape)
        {
            throw Error(ErrorCode::kBundle, "an output " + entry.present + " of the graph, as " + tensor.name + " is",
                present ? "it is of another type or shape" : "there is none",
                "export the bundle again with this edgeattn");
        }
        entry.shape.at(0) = rows;
        entry.bytes = bytes_of(tensor.dtype, with_slots(entry.shape, mCapacity));
        entry.offsets[0] = arena.plan(entry.bytes);
        entry.offsets[1] = mStatic ? entry.offsets[0] : arena.plan(entry.bytes);
        mEntries.push_back(entry);
    }
}

void DecoderCache::add_shapes(std::map<std::string, Shape>& shapes, int64_t slots) const
{
    for (Entry const& entry : mEntries)
    {
        shapes[entry.past] = with_slots(entry.shape, slots);
    }
}

void DecoderCache::bind(LoadedModel& model, int32_t profile, Arena const& arena) const
{
    for (Entry const& entry : mEntries)
    {
        model.bind(profile, entry.past, arena.at(entry.offsets[mSide]));
        model.bind(profile, entry.present, arena.at(entry.offsets[1 - mSide]));
    }
}

void DecoderCache::clear(Gpu const& gpu, Arena const& arena)
{
    mSide = 0;
    for (Entry const& entry : mEntries)
    {
        gpu.clear(arena.at(entry.offsets[0]), entry.bytes);
    }
}

} // namespace edgeattn
