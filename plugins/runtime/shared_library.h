//! A shared library that is opened while the program runs, and stays open to its end.
#pragma once

#include <dlfcn.h>
#include <string>

namespace edgeattn
{

class SharedLibrary
{
public:
    //! Opens the first of some names that is there; ask `is_open`.
    //! A library of NVIDIA has threads and memory of its own, so none is ever closed.
    template <typename... Names>
    explicit SharedLibrary(Names const&... names)
    {
        for (std::string const& name : {std::string(names)...})
        {
            if (!mHandle)
            {
                mHandle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
                char const* const reason = mHandle ? nullptr : dlerror();
                mProblem += reason ? (mProblem.empty() ? "" : "; ") + std::string(reason) : "";
            }
        }
    }

    bool is_open() const
    {
        return mHandle != nullptr;
    }

    //! What the system said of the names that did not open.
    std::string const& problem() const
    {
        return mProblem;
    }

    //! Puts a function into a pointer, which becomes null where there is none of that name.
    template <typename Function>
    bool find(Function*& function, char const* name) const
    {
        function = reinterpret_cast<Function*>(dlsym(mHandle, name));
        return function != nullptr;
    }

private:
    void* mHandle = nullptr;
    std::string mProblem;
};

} // namespace edgeattn
