//! Which tokens a decoder has read, on the host's side: its masks and positions.
#pragma once

#include "loaded_model.h"
#include "padding.h"

#include <optional>

namespace edgeattn
{

//! Whole numbers for an input of an engine.
struct Feed
{
    Shape shape;
    std::vector<int64_t> values;
};

class History
{
public:
    explicit History(int64_t rows)
        : mMasks(static_cast<size_t>(rows))
        , mNext(static_cast<size_t>(rows))
    {
    }

    //! Slots in use, padding included.
    int64_t length() const
    {
        return static_cast<int64_t>(mMasks.front().size());
    }

    //! What the graph may ask for beside its cache, by name.
    //! \param slots of a static cache, none of a growing one.
    std::map<std::string, Feed> feeds(Rows const& rows, std::optional<int64_t> slots) const;

    void add(Rows const& rows);

private:
    std::vector<int64_t> positions(Rows const& rows) const;
    std::vector<int64_t> mask(Rows const& rows, int64_t slots) const;

    std::vector<std::vector<int64_t>> mMasks; // of each row's slots
    std::vector<int64_t> mNext;               // each row's next position
};

} // namespace edgeattn
