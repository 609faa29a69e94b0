//! What the tests drive: each command reads stdin and writes stdout.
#include "edgeattn/engine.hpp"
#include "edgeattn/sampling.hpp"
#include "narrow_floats.h"
#include "sha256.h"

#include <algorithm>
#include <iostream>
#include <iterator>

namespace
{

template <typename T>
bool read(T* values, size_t count)
{
    return bool(std::cin.read(reinterpret_cast<char*>(values), static_cast<std::streamsize>(count * sizeof(T))));
}

//! Doubles to their exponentials.
void exps()
{
    for (double x = 0; read(&x, 1);)
    {
        double const y = edgeattn::exp(x);
        std::cout.write(reinterpret_cast<char const*>(&y), sizeof y);
    }
}

//! Cases of temperature, top_p (fp64), top_k, seed, steps, V (64 bits) and logits to one line of tokens each.
void picks()
{
    double real[2];
    uint64_t whole[4];
    while (read(real, 2) && read(whole, 4))
    {
        std::vector<float> logits(whole[3]);
        read(logits.data(), logits.size());
        edgeattn::Sampling const sampling{real[0], static_cast<int64_t>(whole[0]), real[1], whole[1]};
        try
        {
            for (uint64_t index = 0; index < whole[2]; ++index)
            {
                std::cout << sampling.pick(logits.data(), logits.size(), index) << ' ';
            }
            std::cout << '\n';
        }
        catch (edgeattn::Error const& error)
        {
            std::cout << static_cast<int>(error.code()) << ": " << error.what() << '\n';
        }
    }
}

//! Floats to the bits of the nearest fp16 and bf16, and of what these are in fp32.
void narrows()
{
    for (float x = 0; read(&x, 1);)
    {
        uint16_t const narrow[2] = {edgeattn::to_float16(x), edgeattn::to_bfloat16(x)};
        float const wide[2] = {edgeattn::from_float16(narrow[0]), edgeattn::from_bfloat16(narrow[1])};
        std::cout.write(reinterpret_cast<char const*>(narrow), sizeof narrow);
        std::cout.write(reinterpret_cast<char const*>(wide), sizeof wide);
    }
}

//! Lines of bundle paths to a line each: empty, or what is wrong.
void opens()
{
    for (std::string path; std::getline(std::cin, path);)
    {
        std::string verdict;
        try
        {
            edgeattn::Bundle::open(path);
        }
        catch (edgeattn::Error const& error)
        {
            verdict = error.what();
        }
        std::replace(verdict.begin(), verdict.end(), '\n', ' '); // of a file's name
        std::cout << verdict << std::endl;
    }
}

//! Lines of paths of engines to a line each, as above, of whether their records read.
void records()
{
    for (std::string path; std::getline(std::cin, path);)
    {
        std::string verdict;
        try
        {
            edgeattn::read_engine(path);
        }
        catch (edgeattn::Error const& error)
        {
            verdict = error.what();
        }
        std::replace(verdict.begin(), verdict.end(), '\n', ' ');
        std::cout << verdict << std::endl;
    }
}

//! Lines of engine, bundle, SM and processor, none with a space, to a line each as above.
void engines()
{
    std::string engine, bundle, arch;
    for (int64_t sm = 0; std::cin >> engine >> bundle >> sm >> arch;)
    {
        try
        {
            edgeattn::require_runs_here(edgeattn::read_engine(engine), edgeattn::Bundle::open(bundle), sm, arch);
            std::cout << '\n';
        }
        catch (edgeattn::Error const& error)
        {
            std::cout << static_cast<int>(error.code()) << ": " << error.what() << '\n';
        }
    }
}

void sha256()
{
    std::string const text{std::istreambuf_iterator<char>(std::cin), {}};
    edgeattn::Sha256 whole;
    whole.update(reinterpret_cast<unsigned char const*>(text.data()), text.size());
    edgeattn::Sha256 bytewise;
    for (char const& c : text)
    {
        bytewise.update(reinterpret_cast<unsigned char const*>(&c), 1);
    }
    std::cout << whole.hex() << '\n' << bytewise.hex() << '\n';
}

} // namespace

int main(int argc, char** argv)
{
    std::string const command = argc == 2 ? argv[1] : "";
    command == "exp"      ? exps()
        : command == "pick"   ? picks()
        : command == "open"   ? opens()
        : command == "engine" ? engines()
        : command == "record" ? records()
        : command == "narrow" ? narrows()
                              : sha256();
}
