//! Keys, values and states of a decoder on the GPU. A static cache is written where it lies; what a step returns anew
//! alternates between two copies. As edgeattn/engine/execution.py.
#pragma once

#include "loaded_model.h"

namespace edgeattn
{

class DecoderCache
{
public:
    //! Plans memory for all of it.
    //! \param context most slots that a row will need.
    //! \throws Error kBundle: an input without an output of its type and shape that continues it.
    DecoderCache(LoadedModel const& model, int64_t rows, int64_t context, Arena& arena);

    //! Slots of a row, at most.
    int64_t capacity() const
    {
        return mCapacity;
    }

    //! Whether all slots are always part of the shapes.
    bool is_static() const
    {
        return mStatic;
    }

    //! Which of the two copies the next step reads.
    int side() const
    {
        return mSide;
    }

    //! Adds the shapes of the inputs before a step, with some slots in use.
    void add_shapes(std::map<std::string, Shape>& shapes, int64_t slots) const;

    void bind(LoadedModel& model, int32_t profile, Arena const& arena) const;

    //! A masked slot counts nothing, unless it holds a NaN; a state begins with zeros.
    void clear(Gpu const& gpu, Arena const& arena);

    //! What a step wrote is what the next one reads.
    void advance()
    {
        mSide = mStatic ? 0 : 1 - mSide;
    }

private:
    struct Entry
    {
        std::string past;
        std::string present;
        Shape shape; //!< with the rows of the session; -1 counts slots
        size_t bytes;
        size_t offsets[2];
    };

    std::vector<Entry> mEntries;
    int64_t mCapacity;
    bool mStatic;
    int mSide = 0;
};

} // namespace edgeattn
