#include "core/log.h"
#include "core/exports.h"

#include <NvInferRuntime.h>
#include <array>
#include <atomic>
#include <cstdio>

namespace edgeattn
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};

//! Longer sentences are cut: where memory has run out there is none for a string either.
constexpr size_t kMAX_SENTENCE = 2048;

} // namespace

void logError(char const* op, char const* method, char const* sentence) noexcept
{
    std::array<char, kMAX_SENTENCE> text;
    std::snprintf(text.data(), text.size(), "edgeattn: %s: %s: %s", op, method, sentence);
    nvinfer1::ILoggerFinder* const finder = gLoggerFinder.load();
    nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger == nullptr)
    {
        std::fprintf(stderr, "%s\n", text.data());
        return;
    }
    logger->log(nvinfer1::ILogger::Severity::kERROR, text.data());
}

} // namespace edgeattn

void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    edgeattn::gLoggerFinder = finder;
}
