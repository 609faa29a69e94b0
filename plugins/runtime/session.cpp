#include "edgeattn/session.hpp"

#include "decoder_cache.h"
#include "engine_runs.h"
#include "facts.h"
#include "history.h"
#include "turn.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <deque>
#include <limits>
#include <set>

namespace edgeattn
{
namespace
{

std::string const kLogits = "logits";
std::set<std::string> const kInputs{"attention_mask", "input_ids", "position_ids", "write_indices"};
std::set<std::string> const kTensors{"attention_mask", "input_ids", "logits", "position_ids", "write_indices"};

void require_known_tensors(LoadedModel const& model, int64_t vocabulary)
{
    for (Tensor const& tensor : model.tensors())
    {
        bool const known = !tensor.is_input || kInputs.count(tensor.name) || tensor.name.rfind("past_key_values.", 0) == 0;
        if (!known)
        {
            throw Error(ErrorCode::kBundle, "a decoder whose inputs are tokens, positions and a cache",
                "there is " + tensor.name, "use the edgeattn that exported the bundle");
        }
    }
    Tensor const* const ids = model.find("input_ids");
    Tensor const* const logits = model.find(kLogits);
    if (!ids || !ids->is_input || !logits || logits->is_input)
    {
        throw Error(ErrorCode::kBundle, "a decoder with an input input_ids and an output logits",
            "one of them is missing", "export the bundle again");
    }
    if (logits->shape.size() != 3 || logits->shape.back() != vocabulary)
    {
        throw Error(ErrorCode::kBundle, "logits of shape [batch, length, " + std::to_string(vocabulary) + "]",
            "the graph gives " + to_string(logits->shape), "export the bundle again");
    }
}

//! \return the model, which was built for so many rows.
LoadedModel const& require_rows(LoadedModel const& model, int64_t rows)
{
    if (rows < 1)
    {
        throw Error(ErrorCode::kUsage, "at least 1 row in a session", "there are " + std::to_string(rows),
            "ask for as many as texts run together");
    }
    int64_t most = INT64_MAX; // in each profile
    for (int32_t profile = 0; profile < model.profiles(); ++profile)
    {
        most = std::min(most, model.largest_inputs(profile).at("input_ids").at(0));
    }
    if (rows > most)
    {
        throw Error(ErrorCode::kLowering, "at most " + std::to_string(most) + " rows, as the engine was built for",
            "there are " + std::to_string(rows), "export with a larger --batch and build again");
    }
    return model;
}

} // namespace

class Session::Impl final : public Session::Turns
{
public:
    Impl(Bundle const& bundle, SessionOptions const& options)
        : mFacts(decoder_facts(bundle))
        , mRows(options.rows)
        , mModel(bundle, options.engine)
        , mCache((require_known_tensors(mModel, mFacts.vocabulary), require_rows(mModel, mRows)), mRows, mFacts.context,
              mArena)
        , mRuns(options.cuda_graph)
        , mHistory(mRows)
    {
        mContext = std::min(mFacts.context, mCache.capacity());
        Gpu::Current const current(mModel.gpu());
        mOffsets = mModel.plan(mArena, kTensors, mRows);
        mArena.allocate(mModel.gpu());
        forget();
    }

    Logits step(int64_t const* tokens, int64_t length) override
    {
        return step(tokens, length, nullptr, Positions::kLast);
    }

    Logits step(int64_t const* tokens, int64_t length, int64_t const* mask, Positions positions)
    {
        require_room(length);
        Rows const rows = checked_rows(tokens, mRows, length, mask, mFacts.vocabulary);
        require_fit(rows);
        std::map<std::string, Feed> const feeds = feeds_of(rows);
        std::map<std::string, Shape> shapes;
        mCache.add_shapes(shapes, mHistory.length());
        for (auto const& [name, feed] : feeds)
        {
            shapes[name] = feed.shape;
        }
        Gpu::Current const current(mModel.gpu());
        int32_t const profile = mModel.choose_profile(shapes, "input_ids"); // decoding has its own
        mLost = true; // unless all of it succeeds
        std::deque<std::vector<unsigned char>> alive;
        Gpu::Settled const settled(mModel.gpu()); // before what it copies from goes
        upload(feeds, alive);
        mRuns.run(mModel, profile, mCache.side(), shapes, [&] { bind(profile); });
        Logits const logits = download(mModel.output_shape(profile, kLogits), rows, positions);
        require_finite(logits, rows); // what is not may stand in the cache, too
        mHistory.add(rows);
        mCache.advance();
        mLost = false;
        return logits;
    }

    void reset() override
    {
        Gpu::Current const current(mModel.gpu());
        forget();
    }

    //! Held by every call.
    std::atomic_flag& busy()
    {
        return mBusy;
    }

    DecoderFacts const& facts() const
    {
        return mFacts;
    }

    int64_t rows() const
    {
        return mRows;
    }

    int64_t context() const
    {
        return mContext;
    }

    int64_t length() const
    {
        return mHistory.length();
    }

    size_t device_bytes() const
    {
        return mArena.bytes();
    }

    bool replays() const
    {
        return mRuns.replays();
    }

private:
    void forget()
    {
        mCache.clear(mModel.gpu(), mArena);
        mModel.gpu().synchronize();
        mHistory = History(mRows);
        mLost = false;
    }

    void require_room(int64_t length) const
    {
        if (length > mContext - mHistory.length())
        {
            throw Error(ErrorCode::kRuntimeInput,
                "at most " + std::to_string(mContext) + " tokens, the context of the bundle",
                length > INT64_MAX - mHistory.length()
                    ? "there would be more"
                    : "there would be " + std::to_string(mHistory.length() + length),
                "give a shorter text, or export with a larger --context");
        }
    }

    void require_fit(Rows const& rows) const
    {
        if (mLost)
        {
            throw Error(ErrorCode::kRuntimeInput, "a session whose last step succeeded",
                "it failed, and its state is lost", "call reset and give all tokens again");
        }
        for (int64_t row = 0; row < mRows; ++row)
        {
            require_tokens(row, rows.tokens_of(row), rows.length);
        }
    }

    void require_tokens(int64_t row, int64_t tokens, int64_t length) const
    {
        if (mHistory.length() == 0 && tokens == 0)
        {
            throw Error(ErrorCode::kRuntimeInput, "at least one token in every row",
                "row " + std::to_string(row) + " is all padding", "leave that row out");
        }
        if (mFacts.last_only && tokens != length)
        {
            throw Error(ErrorCode::kRuntimeInput,
                "rows of equal length for a bundle with logits of the last place only",
                "row " + std::to_string(row) + " ends in padding",
                "run rows of one length together, or export with --logits all");
        }
    }

    //! Those of the possible inputs that the graph has.
    std::map<std::string, Feed> feeds_of(Rows const& rows) const
    {
        auto feeds = mHistory.feeds(rows, mCache.is_static() ? std::optional(mCache.capacity()) : std::nullopt);
        for (std::string const& name : kInputs)
        {
            if (!mModel.find(name))
            {
                feeds.erase(name);
            }
        }
        return feeds;
    }

    //! \param alive takes what must live until the stream is done.
    void upload(std::map<std::string, Feed> const& feeds, std::deque<std::vector<unsigned char>>& alive)
    {
        for (auto const& [name, feed] : feeds)
        {
            alive.push_back(LoadedModel::encode(*mModel.find(name), feed.values));
            mModel.gpu().upload(mArena.at(mOffsets.at(name)), alive.back().data(), alive.back().size());
        }
    }

    void bind(int32_t profile)
    {
        for (auto const& [name, offset] : mOffsets)
        {
            mModel.bind(profile, name, mArena.at(offset));
        }
        mCache.bind(mModel, profile, mArena);
    }

    //! Waits for the logits that are wanted.
    Logits download(Shape const& given, Rows const& rows, Positions positions)
    {
        bool const fits = given.size() == 3 && given[0] == mRows && given[2] == mFacts.vocabulary;
        if (!fits || (given[1] != rows.length && given[1] != 1))
        {
            throw Error(ErrorCode::kBundle,
                "logits of shape [batch, length, " + std::to_string(mFacts.vocabulary) + "]",
                "the graph gives " + to_string(given), "export the bundle again");
        }
        Tensor const& tensor = *mModel.find(kLogits);
        size_t const place = bytes_of(tensor.dtype, {given[2]});
        bool const every = positions == Positions::kAll || given[1] == 1;
        int64_t const kept = every ? given[1] : 1;
        std::vector<unsigned char> raw(static_cast<size_t>(mRows * kept) * place);
        for (int64_t row = 0; row < mRows; ++row)
        {
            int64_t const first = every ? 0 : std::max<int64_t>(rows.tokens_of(row) - 1, 0);
            Gpu::Address const from
                = mArena.at(mOffsets.at(kLogits)) + static_cast<size_t>(row * given[1] + first) * place;
            size_t const bytes = static_cast<size_t>(kept) * place;
            mModel.gpu().download(raw.data() + static_cast<size_t>(row) * bytes, from, bytes);
        }
        mModel.gpu().synchronize();
        mLogits = LoadedModel::decode(tensor, raw);
        return {mLogits.data(), mRows, kept, mFacts.vocabulary};
    }

    //! Of padding, logits mean nothing; -inf forbids a token.
    void require_finite(Logits const& logits, Rows const& rows) const
    {
        for (int64_t row = 0; row < mRows; ++row)
        {
            int64_t const tokens = rows.tokens_of(row);
            float const* place = logits.data + row * logits.positions * logits.vocabulary;
            for (int64_t i = 0; i < std::min(tokens, logits.positions); ++i, place += logits.vocabulary)
            {
                require_finite(place, place + logits.vocabulary);
            }
        }
    }

    static void require_finite(float const* begin, float const* end)
    {
        bool const bounded
            = std::all_of(begin, end, [](float logit) { return logit <= std::numeric_limits<float>::max(); });
        bool const some = std::any_of(begin, end, [](float logit) { return std::isfinite(logit); });
        if (!bounded || !some)
        {
            throw Error(ErrorCode::kRuntimeInput, "finite logits", "the model returned NaN or infinity",
                "run `edgeattn verify` on the bundle; fp16 may be too narrow for this model");
        }
    }

    DecoderFacts mFacts;
    int64_t mRows;
    int64_t mContext = 0;
    LoadedModel mModel;
    Arena mArena;
    DecoderCache mCache;
    EngineRuns mRuns;
    History mHistory;
    std::map<std::string, size_t> mOffsets; // of what is no cache
    std::vector<float> mLogits;
    bool mLost = false;
    std::atomic_flag mBusy = ATOMIC_FLAG_INIT;
};

Session::Session(std::unique_ptr<Impl> impl)
    : mImpl(std::move(impl))
{
}

Session::Session(Session&& other) noexcept = default;
Session& Session::operator=(Session&& other) noexcept = default;
Session::~Session() = default;

Session Session::open(Bundle const& bundle, SessionOptions const& options)
{
    return Session(std::make_unique<Impl>(bundle, options));
}

Session Session::open(std::string const& bundle, SessionOptions const& options)
{
    return open(Bundle::open(bundle), options);
}

int64_t Session::rows() const
{
    return mImpl->rows();
}

int64_t Session::vocabulary() const
{
    return mImpl->facts().vocabulary;
}

int64_t Session::context() const
{
    return mImpl->context();
}

int64_t Session::length() const
{
    return mImpl->length();
}

std::vector<int64_t> const& Session::stop_tokens() const
{
    return mImpl->facts().stop_tokens;
}

size_t Session::device_bytes() const
{
    return mImpl->device_bytes();
}

bool Session::replays() const
{
    return mImpl->replays();
}

void Session::alone(std::function<void(Turns&)> const& work)
{
    Turn const turn(mImpl->busy());
    work(*mImpl);
}

Logits Session::step(int64_t const* tokens, int64_t length, int64_t const* mask, Positions positions)
{
    Turn const turn(mImpl->busy());
    return mImpl->step(tokens, length, mask, positions);
}

void Session::reset()
{
    Turn const turn(mImpl->busy());
    mImpl->reset();
}

} // namespace edgeattn
