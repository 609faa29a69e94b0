//! How everything of edgeattn in C++ refuses.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

// Of libedgeattn, whose package defines it: its strings and exceptions are those of one standard library.
#if defined(EDGEATTN_WITH_LIBCPP) && EDGEATTN_WITH_LIBCPP && !defined(_LIBCPP_VERSION)
#error "this libedgeattn was built with LLVM's C++ library: use its C header edgeattn/edgeattn.h, or build it yourself"
#elif defined(EDGEATTN_WITH_LIBCPP) && !EDGEATTN_WITH_LIBCPP && defined(_LIBCPP_VERSION)
#error "this libedgeattn was built with GNU's C++ library: use its C header edgeattn/edgeattn.h, or build it yourself"
#endif

#if defined(__GNUC__)
#define EDGEATTN_API __attribute__((visibility("default")))
#else
#define EDGEATTN_API
#endif

namespace edgeattn
{

//! Which of Python's errors it is (`edgeattn.errors`); the values are those of edgeattn.h.
enum class ErrorCode
{
    kInternal = 1,     //!< a defect, or no memory
    kUsage = 2,        //!< UsageError: a setting outside its range
    kBundle = 3,       //!< BundleError: missing, damaged, or made for something else
    kRuntimeInput = 4, //!< RuntimeInputError: a tensor that cannot be used
    kLowering = 5,     //!< LoweringError: made for another GPU, processor or TensorRT, or TensorRT refuses it
    kMissing = 6,      //!< MissingDependencyError: no driver, no GPU, no TensorRT
};

//! A refusal that a user can act on: what was expected, what came, what to do.
class EDGEATTN_API Error : public std::runtime_error
{
public:
    //! \param tensorrt the last message of TensorRT, where it is TensorRT that refuses.
    Error(ErrorCode code, std::string const& expected, std::string const& came, std::string const& todo,
        std::string const& tensorrt = {})
        : Error(Sentence{"expected " + expected + ", but " + came + ": " + todo}, code, tensorrt)
    {
    }

    //! Of the plugin library, of which TensorRT hears the sentence alone.
    Error(std::string const& expected, std::string const& came, std::string const& todo)
        : Error(ErrorCode::kLowering, expected, came, todo)
    {
    }

    //! A refusal that was put into a sentence elsewhere.
    static Error said(ErrorCode code, std::string const& sentence, std::string const& tensorrt)
    {
        return {Sentence{sentence}, code, tensorrt};
    }

    ErrorCode code() const noexcept
    {
        return mCode;
    }

    //! TensorRT's own last message, empty where the refusal is not TensorRT's.
    char const* tensorrt() const noexcept
    {
        return mTensorrt.what();
    }

private:
    struct Sentence
    {
        std::string const& text;
    };

    Error(Sentence sentence, ErrorCode code, std::string const& tensorrt)
        : std::runtime_error(whole(sentence.text))
        , mCode(code)
        , mTensorrt(whole(tensorrt))
    {
    }

    //! what() would end at a zero byte, which a file's name in a manifest can hold.
    static std::string whole(std::string sentence)
    {
        std::replace(sentence.begin(), sentence.end(), '\0', '?');
        return sentence;
    }

    ErrorCode mCode;
    std::runtime_error mTensorrt; // a string whose copy cannot throw
};

} // namespace edgeattn
