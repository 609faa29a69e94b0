#include "engine_runs.h"

namespace edgeattn
{

void EngineRuns::run(LoadedModel& model, int32_t profile, int side, std::map<std::string, Shape> const& shapes,
    std::function<void()> const& bind)
{
    Profile& held = mProfiles[profile];
    if (held.shapes != shapes)
    {
        held = {shapes, {}};
    }
    Run& run = held.sides[side];
    if (!run.recording)
    {
        model.set_shapes(profile, shapes);
        bind();
        // In the first run TensorRT settles what new shapes need; work of the second can be recorded, if at all.
        run.recording = mReplay && ++run.count == 2 ? model.record(profile) : nullptr;
    }
    mReplays = run.recording != nullptr;
    mReplays ? model.gpu().replay(*run.recording) : model.run(profile);
}

} // namespace edgeattn
