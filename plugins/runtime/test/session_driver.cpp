//! What the tests drive: a session, by lines of JSON. Each is answered by one line: a result, or {"code", "error",
//! "tensorrt"}.
#include "edgeattn/edgeattn.h"
#include "edgeattn/encoder_session.hpp"
#include "edgeattn/generator.hpp"

#include <atomic>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

namespace
{

using Json = nlohmann::json;
using edgeattn::Error;

std::optional<edgeattn::Session> gSession;
std::optional<edgeattn::EncoderSession> gEncoder;

std::vector<int64_t> numbers(Json const& asked, char const* name)
{
    return asked.value(name, std::vector<int64_t>{});
}

Json open(Json const& asked)
{
    gSession.reset();
    edgeattn::SessionOptions options;
    options.engine = asked.value("engine", "");
    options.rows = asked.value("rows", int64_t{1});
    options.cuda_graph = asked.value("cuda_graph", true);
    gSession = edgeattn::Session::open(asked.at("bundle").get<std::string>(), options);
    return {{"vocabulary", gSession->vocabulary()}, {"context", gSession->context()},
        {"stop_tokens", gSession->stop_tokens()}, {"device_bytes", gSession->device_bytes()}};
}

Json step(Json const& asked)
{
    std::vector<int64_t> const tokens = numbers(asked, "tokens"), mask = numbers(asked, "mask");
    auto const positions = asked.value("all", false) ? edgeattn::Positions::kAll : edgeattn::Positions::kLast;
    int64_t const length = static_cast<int64_t>(tokens.size()) / gSession->rows();
    edgeattn::Logits const found
        = gSession->step(tokens.data(), length, mask.empty() ? nullptr : mask.data(), positions);
    std::vector<float> const logits(found.data, found.data + found.rows * found.positions * found.vocabulary);
    return {{"logits", logits}, {"shape", {found.rows, found.positions, found.vocabulary}},
        {"length", gSession->length()}, {"replays", gSession->replays()}};
}

Json generate(Json const& asked)
{
    edgeattn::GeneratorOptions options;
    options.max_new_tokens = asked.value("max_new_tokens", int64_t{128});
    options.sampling = {asked.value("temperature", 0.0), asked.value("top_k", int64_t{0}), asked.value("top_p", 1.0),
        asked.value("seed", uint64_t{0})};
    options.stop_tokens = numbers(asked, "stop_tokens");
    int64_t const most = asked.value("interrupt", int64_t{0});
    std::vector<int64_t> streamed;
    edgeattn::Generation const found
        = edgeattn::Generator(*gSession).generate(numbers(asked, "prompt"), options, [&](int64_t token) {
              streamed.push_back(token);
              return static_cast<int64_t>(streamed.size()) != most;
          });
    return {{"tokens", found.tokens}, {"streamed", streamed}, {"reason", static_cast<int>(found.finish_reason)},
        {"decode_steps", found.decode_steps}, {"replays", gSession->replays()}};
}

//! The same through the C functions.
Json generate_c(Json const& asked)
{
    edgeattn_bundle* bundle = nullptr;
    edgeattn_session* session = nullptr;
    std::vector<int64_t> const prompt = numbers(asked, "prompt");
    std::vector<int64_t> streamed;
    edgeattn_generator_options options{asked.value("max_new_tokens", int64_t{128}), {0, 0, 1, 0}, nullptr, 0};
    auto const on_token = [](int64_t token, void* user) {
        static_cast<std::vector<int64_t>*>(user)->push_back(token);
        return 1;
    };
    edgeattn_finish_reason reason = EDGEATTN_FINISH_INTERRUPTED;
    edgeattn_code code = edgeattn_bundle_open(asked.at("bundle").get<std::string>().c_str(), 1, &bundle);
    code = code ? code : edgeattn_session_open(bundle, nullptr, &session);
    code = code ? code
                : edgeattn_generate(session, prompt.data(), prompt.size(), &options, on_token, &streamed, &reason);
    edgeattn_session_close(session);
    edgeattn_bundle_close(bundle);
    if (code)
    {
        return {{"code", code}, {"error", edgeattn_last_error()}, {"tensorrt", edgeattn_last_tensorrt_message()}};
    }
    return {{"tokens", streamed}, {"reason", static_cast<int>(reason)}};
}

//! Steps of two threads at once: how many succeed, and what the others are told.
Json threads(Json const& asked)
{
    std::atomic<int> passed{0};
    std::vector<std::string> refusals(2);
    std::vector<std::thread> running;
    for (std::string& refusal : refusals)
    {
        running.emplace_back([&] {
            for (int64_t i = 0; i < asked.value("steps", int64_t{20}); ++i)
            {
                try
                {
                    int64_t const token = 1;
                    gSession->step(&token, 1);
                    ++passed;
                }
                catch (Error const& error)
                {
                    refusal = std::to_string(static_cast<int>(error.code())) + ": " + error.what();
                }
            }
        });
    }
    for (std::thread& thread : running)
    {
        thread.join();
    }
    return {{"passed", passed.load()}, {"length", gSession->length()}, {"refusals", refusals}};
}

Json encode(Json const& asked)
{
    if (!gEncoder)
    {
        gEncoder = edgeattn::EncoderSession::open(
            asked.at("bundle").get<std::string>(), asked.value("engine", ""));
    }
    std::vector<int64_t> const tokens = numbers(asked, "tokens"), mask = numbers(asked, "mask"),
                               types = numbers(asked, "types");
    std::vector<float> const pixels = asked.value("pixels", std::vector<float>{});
    int64_t const rows = asked.at("rows");
    edgeattn::Encoding const found = pixels.empty()
        ? gEncoder->run(tokens.data(), rows, static_cast<int64_t>(tokens.size()) / rows,
            mask.empty() ? nullptr : mask.data(), types.empty() ? nullptr : types.data())
        : gEncoder->run_images(pixels.data(), rows);
    int64_t count = 1;
    for (int64_t size : found.shape)
    {
        count *= size;
    }
    return {{"values", std::vector<float>(found.data, found.data + count)}, {"shape", found.shape}};
}

Json answer(Json const& asked)
{
    std::string const what = asked.at("do");
    if (what == "reset")
    {
        gSession->reset();
        return Json::object();
    }
    if (what == "close")
    {
        gSession.reset();
        gEncoder.reset();
        return Json::object();
    }
    return what == "open" ? open(asked)
        : what == "step"  ? step(asked)
        : what == "generate" ? generate(asked)
        : what == "generate_c" ? generate_c(asked)
        : what == "threads" ? threads(asked)
                            : encode(asked);
}

} // namespace

int main()
{
    for (std::string line; std::getline(std::cin, line);)
    {
        Json found;
        try
        {
            found = answer(Json::parse(line));
        }
        catch (Error const& error)
        {
            found = {{"code", static_cast<int>(error.code())}, {"error", error.what()}, {"tensorrt", error.tensorrt()}};
        }
        std::cout << found.dump() << std::endl;
    }
    gSession.reset();
    gEncoder.reset();
}
