#include "edgeattn/encoder_session.hpp"

#include "engine_runs.h"
#include "facts.h"
#include "padding.h"
#include "turn.h"

#include <algorithm>
#include <cmath>

namespace edgeattn
{

class EncoderSession::Impl
{
public:
    Impl(Bundle const& bundle, std::string const& engine)
        : mFacts(encoder_facts(bundle))
        , mModel(bundle, engine)
        , mOutput(only_output())
        , mRuns(true)
    {
        Gpu::Current const current(mModel.gpu());
        std::set<std::string> names{mOutput.name};
        for (Tensor const* tensor : inputs())
        {
            names.insert(tensor->name);
        }
        mOffsets = mModel.plan(mArena, names);
        mArena.allocate(mModel.gpu());
    }

    Encoding run(
        int64_t const* tokens, int64_t rows, int64_t length, int64_t const* mask, int64_t const* types)
    {
        Turn const turn(mBusy);
        require_input("texts", "images", "run_images", mFacts.vocabulary > 0);
        require_length(length);
        Rows const checked = checked_rows(tokens, rows, length, mask, mFacts.vocabulary);
        require_texts(checked);
        std::vector<int64_t> segments(checked.tokens.size(), 0);
        if (types && mFacts.token_types > 0)
        {
            std::copy_n(types, segments.size(), segments.begin());
            require_below("token_type_ids", segments, mFacts.token_types);
        }
        std::map<std::string, std::vector<int64_t> const*> const known{
            {"input_ids", &checked.tokens}, {"attention_mask", &checked.mask}, {"token_type_ids", &segments}};
        std::map<std::string, Shape> shapes;
        std::map<std::string, std::vector<unsigned char>> raw;
        for (Tensor const* tensor : inputs())
        {
            auto const found = known.find(tensor->name);
            if (found == known.end())
            {
                unknown(tensor->name);
            }
            shapes[tensor->name] = {rows, length};
            raw[tensor->name] = LoadedModel::encode(*tensor, *found->second);
        }
        Encoding const found = execute(shapes, raw, "input_ids");
        require_finite(checked);
        return found;
    }

    Encoding run_images(float const* pixels, int64_t rows)
    {
        Turn const turn(mBusy);
        require_input("images", "texts", "run", mFacts.vocabulary == 0);
        Shape shape{rows};
        shape.insert(shape.end(), mFacts.image_size.begin(), mFacts.image_size.end());
        if (!pixels || rows < 1)
        {
            throw Error(ErrorCode::kRuntimeInput, "at least one image", "there is none", "pass some");
        }
        size_t const count = bytes_of(DataType::kInt8, shape);
        if (!std::all_of(pixels, pixels + count, [](float pixel) { return std::isfinite(pixel); }))
        {
            throw Error(ErrorCode::kRuntimeInput, "pixels as finite floating-point numbers", "some are not",
                "scale and normalise them as the model was trained");
        }
        std::map<std::string, Shape> shapes;
        std::map<std::string, std::vector<unsigned char>> raw;
        for (Tensor const* tensor : inputs())
        {
            if (tensor->name != "pixel_values")
            {
                unknown(tensor->name);
            }
            shapes[tensor->name] = shape;
            raw[tensor->name] = LoadedModel::encode(*tensor, pixels, count);
        }
        Encoding const found = execute(shapes, raw, "pixel_values");
        require_finite(mValues.data(), mValues.data() + mValues.size());
        return found;
    }

    EncoderFacts const& facts() const
    {
        return mFacts;
    }

private:
    Tensor only_output() const
    {
        std::vector<Tensor const*> outputs;
        for (Tensor const& tensor : mModel.tensors())
        {
            if (!tensor.is_input)
            {
                outputs.push_back(&tensor);
            }
        }
        if (outputs.size() != 1)
        {
            throw Error(ErrorCode::kBundle, "an encoder with one output", "it has " + std::to_string(outputs.size()),
                "use the edgeattn that exported the bundle");
        }
        return *outputs.front();
    }

    std::vector<Tensor const*> inputs() const
    {
        std::vector<Tensor const*> inputs;
        for (Tensor const& tensor : mModel.tensors())
        {
            if (tensor.is_input)
            {
                inputs.push_back(&tensor);
            }
        }
        return inputs;
    }

    [[noreturn]] static void unknown(std::string const& name)
    {
        throw Error(ErrorCode::kBundle, "an encoder whose inputs are tokens or pixels", "there is " + name,
            "use the edgeattn that exported the bundle");
    }

    static void require_input(
        std::string const& asked, std::string const& reads, std::string const& call, bool fits)
    {
        if (!fits)
        {
            throw Error(ErrorCode::kRuntimeInput, "an encoder of " + asked, "it reads " + reads, "use " + call);
        }
    }

    void require_length(int64_t length) const
    {
        if (length > mFacts.context)
        {
            throw Error(ErrorCode::kRuntimeInput,
                "texts of at most " + std::to_string(mFacts.context) + " tokens, the context of the bundle",
                "one has " + std::to_string(length), "shorten it, or split it into several");
        }
    }

    static void require_texts(Rows const& rows)
    {
        for (int64_t row = 0; row < rows.rows; ++row)
        {
            if (rows.tokens_of(row) == 0)
            {
                throw Error(ErrorCode::kRuntimeInput, "at least one token in each row of attention_mask",
                    "a row is all padding", "leave that row out");
            }
        }
    }

    //! Token states mean nothing at padding.
    void require_finite(Rows const& rows) const
    {
        if (mShape.size() != 3)
        {
            require_finite(mValues.data(), mValues.data() + mValues.size());
            return;
        }
        int64_t const width = mShape[2];
        for (int64_t row = 0; row < rows.rows; ++row)
        {
            float const* const begin = mValues.data() + row * mShape[1] * width;
            require_finite(begin, begin + std::min(rows.tokens_of(row), mShape[1]) * width);
        }
    }

    static void require_finite(float const* begin, float const* end)
    {
        if (!std::all_of(begin, end, [](float value) { return std::isfinite(value); }))
        {
            throw Error(ErrorCode::kRuntimeInput, "finite outputs", "the model returned NaN or infinity",
                "run `edgeattn verify` on the bundle; fp16 may be too narrow for this model");
        }
    }

    Encoding execute(std::map<std::string, Shape> const& shapes,
        std::map<std::string, std::vector<unsigned char>> const& raw, std::string const& of)
    {
        Gpu::Current const current(mModel.gpu());
        int32_t const profile = mModel.choose_profile(shapes, of);
        Gpu::Settled const settled(mModel.gpu()); // before what it copies from goes
        for (auto const& [name, bytes] : raw)
        {
            mModel.gpu().upload(mArena.at(mOffsets.at(name)), bytes.data(), bytes.size());
        }
        mRuns.run(mModel, profile, 0, shapes, [&] {
            for (auto const& [name, offset] : mOffsets)
            {
                mModel.bind(profile, name, mArena.at(offset));
            }
        });
        mShape = mModel.output_shape(profile, mOutput.name);
        std::vector<unsigned char> found(bytes_of(mOutput.dtype, mShape));
        mModel.gpu().download(found.data(), mArena.at(mOffsets.at(mOutput.name)), found.size());
        mModel.gpu().synchronize();
        mValues = LoadedModel::decode(mOutput, found);
        return {mValues.data(), mShape};
    }

    EncoderFacts mFacts;
    LoadedModel mModel;
    Tensor mOutput;
    Arena mArena;
    EngineRuns mRuns;
    std::map<std::string, size_t> mOffsets;
    Shape mShape;
    std::vector<float> mValues;
    std::atomic_flag mBusy = ATOMIC_FLAG_INIT;
};

EncoderSession::EncoderSession(std::unique_ptr<Impl> impl)
    : mImpl(std::move(impl))
{
}

EncoderSession::EncoderSession(EncoderSession&& other) noexcept = default;
EncoderSession& EncoderSession::operator=(EncoderSession&& other) noexcept = default;
EncoderSession::~EncoderSession() = default;

EncoderSession EncoderSession::open(Bundle const& bundle, std::string const& engine)
{
    return EncoderSession(std::make_unique<Impl>(bundle, engine));
}

EncoderSession EncoderSession::open(std::string const& bundle, std::string const& engine)
{
    return open(Bundle::open(bundle), engine);
}

int64_t EncoderSession::vocabulary() const
{
    return mImpl->facts().vocabulary;
}

std::vector<int64_t> const& EncoderSession::image_size() const
{
    return mImpl->facts().image_size;
}

Encoding EncoderSession::run(
    int64_t const* tokens, int64_t rows, int64_t length, int64_t const* mask, int64_t const* types)
{
    return mImpl->run(tokens, rows, length, mask, types);
}

Encoding EncoderSession::run_images(float const* pixels, int64_t rows)
{
    return mImpl->run_images(pixels, rows);
}

} // namespace edgeattn
