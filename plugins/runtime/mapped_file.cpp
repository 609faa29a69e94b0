#include "mapped_file.h"

#include "edgeattn/error.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace edgeattn
{

MappedFile::MappedFile(std::string const& path)
{
    int const file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat facts = {};
    void* data = MAP_FAILED;
    if (file >= 0 && fstat(file, &facts) == 0 && facts.st_size > 0)
    {
        mBytes = static_cast<size_t>(facts.st_size);
        data = mmap(nullptr, mBytes, PROT_READ, MAP_PRIVATE, file, 0);
    }
    if (file >= 0)
    {
        close(file);
    }
    if (data == MAP_FAILED)
    {
        throw Error(ErrorCode::kBundle, path + " to be readable", "the system does not map it",
            "check its permissions or copy it again");
    }
    mData = data;
}

MappedFile::~MappedFile()
{
    munmap(mData, mBytes);
}

} // namespace edgeattn
