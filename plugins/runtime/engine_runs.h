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
        int64_t count = 0;
        std::shared_ptr<Recording const> recording;
    };

    //! Other shapes change what a context keeps on the GPU, so that no recording with earlier ones is good any more.
    struct Profile
    {
        std::map<std::string, Shape> shapes;
        std::map<int, Run> sides;
    };

    bool mReplay;
    bool mReplays = false;
    std::map<int32_t, Profile> mProfiles;
};

} // namespace edgeattn
