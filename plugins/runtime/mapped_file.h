//! A file's content, read as it is asked for.
#pragma once

#include <cstddef>
#include <string>

namespace edgeattn
{

class MappedFile
{
public:
    //! \throws Error kBundle: it cannot be read, or is empty.
    explicit MappedFile(std::string const& path);
    ~MappedFile();
    MappedFile(MappedFile const&) = delete;
    MappedFile& operator=(MappedFile const&) = delete;

    void const* data() const
    {
        return mData;
    }

    size_t bytes() const
    {
        return mBytes;
    }

private:
    void* mData = nullptr;
    size_t mBytes = 0;
};

} // namespace edgeattn
