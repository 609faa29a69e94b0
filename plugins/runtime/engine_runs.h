//! Runs of an engine, replayed as a CUDA graph where their shapes and addresses stay the same.
#pragma once

#include "loaded_model.h"

#include <functional>

namespace edgeattn
{

class EngineRuns
{
public:
    //! \param replay whether to record at all.
    explicit EngineRuns(bool replay)
        : mReplay(replay)
    {
    }

    //! Puts a run behind what the stream does already.
    //! \param side which of two sets of addresses it uses.
    //! \param bind binds them.
    void run(LoadedModel& model, int32_t profile, int side, std::map<std::string, Shape> const& shapes,
        std::function<void()> const& bind);

    //! Whether the last run was a replay.
    bool replays() const
    {
        return mReplays;
    }

private:
    struct Run
    {
        std::map<std::string, Shape> shapes;
        int64_t count = 0;
        std::shared_ptr<Recording const> recording;
    };

    bool mReplay;
    bool mReplays = false;
    std::map<std::pair<int32_t, int>, Run> mRuns;
};

} // namespace edgeattn
