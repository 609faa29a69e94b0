#include "edgeattn/generator.hpp"

#include "padding.h"

#include <algorithm>
#include <chrono>

namespace edgeattn
{
namespace
{

// A long prompt goes in pieces, as in edgeattn/runtime/generate.py: engines are built for so many tokens at once.
constexpr size_t kPrefillPiece = 512;

double seconds_since(std::chrono::steady_clock::time_point start)
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void require_prompt(std::vector<int64_t> const& prompt, Session const& session)
{
    require_below("token ids", prompt, session.vocabulary());
    if (prompt.empty())
    {
        throw Error(ErrorCode::kRuntimeInput, "a prompt of at least one token", "it is empty",
            "pass a text (this tokenizer adds no token of beginning)");
    }
    int64_t const tokens = static_cast<int64_t>(prompt.size());
    if (tokens > session.context())
    {
        throw Error(ErrorCode::kRuntimeInput,
            "a prompt of at most " + std::to_string(session.context()) + " tokens, the context of the bundle",
            "it has " + std::to_string(tokens),
            "shorten it, or export with a larger --context if the model knows one");
    }
}

} // namespace

Generator::Generator(Session& session)
    : mSession(session)
{
    if (session.rows() != 1)
    {
        throw Error(ErrorCode::kUsage, "a session of 1 row to generate with",
            "it has " + std::to_string(session.rows()), "open it with 1 row");
    }
}

Generation Generator::generate(
    std::vector<int64_t> const& prompt, GeneratorOptions const& options, OnToken const& on_token)
{
    if (options.max_new_tokens < 1)
    {
        throw Error(ErrorCode::kUsage, "at least 1 token to generate",
            "it is " + std::to_string(options.max_new_tokens), "give more");
    }
    options.sampling.check();
    require_prompt(prompt, mSession);
    require_below("token ids", options.stop_tokens, mSession.vocabulary());
    std::vector<int64_t> stops = mSession.stop_tokens();
    stops.insert(stops.end(), options.stop_tokens.begin(), options.stop_tokens.end());

    auto const pick = [&](Logits const& logits, int64_t index) {
        return options.sampling.pick(
            logits.data, static_cast<size_t>(logits.vocabulary), static_cast<uint64_t>(index));
    };
    Generation found;
    //! Takes a token; whether it is the last.
    auto const ends = [&](int64_t token) {
        if (std::find(stops.begin(), stops.end(), token) != stops.end())
        {
            found.finish_reason = FinishReason::kStop;
            return true;
        }
        found.tokens.push_back(token);
        bool const wanted = !on_token || on_token(token);
        bool const enough = static_cast<int64_t>(found.tokens.size()) == options.max_new_tokens;
        bool const full = mSession.length() == mSession.context();
        found.finish_reason = !wanted ? FinishReason::kInterrupted
            : enough                  ? FinishReason::kLength
                                      : FinishReason::kContext;
        return !wanted || enough || full;
    };
    mSession.alone([&](Session::Turns& turns) {
        turns.reset();
        auto const start = std::chrono::steady_clock::now();
        Logits logits;
        for (size_t first = 0; first < prompt.size(); first += kPrefillPiece)
        {
            size_t const count = std::min(kPrefillPiece, prompt.size() - first);
            logits = turns.step(prompt.data() + first, static_cast<int64_t>(count));
        }
        int64_t token = pick(logits, 0);
        found.prefill_seconds = seconds_since(start);
        while (!ends(token))
        {
            auto const began = std::chrono::steady_clock::now();
            token = pick(turns.step(&token, 1), static_cast<int64_t>(found.tokens.size()));
            found.decode_seconds += seconds_since(began);
            ++found.decode_steps;
        }
    });
    return found;
}

} // namespace edgeattn
