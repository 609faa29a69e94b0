// Says what a bundle is and whether this machine can run it, as far as it gets:
//
//     build/facts BUNDLE
#include <edgeattn/plugin_library.hpp>
#include <edgeattn/session.hpp>
#include <iostream>

int main(int count, char** words)
try
{
    edgeattn::Bundle const bundle = edgeattn::Bundle::open(count > 1 ? words[1] : "bundle");
    std::cout << "bundle for " << bundle.manifest.target.name << ", " << bundle.manifest.files.size()
              << " files as its manifest says\n";
    if (auto const library = edgeattn::plugin_library(bundle))
    {
        std::cout << "plugin library for " << library->arch << " of ABI " << library->abi << ":";
        for (std::string const& op : library->ops)
        {
            std::cout << ' ' << op;
        }
        std::cout << '\n';
    }
    edgeattn::Session const session = edgeattn::Session::open(bundle);
    std::cout << "session of " << session.context() << " tokens with " << session.device_bytes()
              << " bytes of its own on the GPU\n";
}
catch (edgeattn::Error const& error)
{
    std::cerr << "facts: " << error.what() << '\n';
    return 1;
}
