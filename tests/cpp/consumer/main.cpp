// An application that knows the installed package alone. It reads commands, one a line:
//   logits V0 V1 ...        those of the picks that follow
//   pick TEMPERATURE TOP_K TOP_P SEED INDEX
//   exp X | uniform SEED INDEX
// and answers each but the first with a line: an id, a number in hexadecimal, or a refusal.
#include <edgeattn/error.hpp>
#include <edgeattn/sampling.hpp>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

int main()
{
    std::vector<float> logits;
    for (std::string line; std::getline(std::cin, line);)
    {
        std::istringstream words(line);
        std::string command, word;
        words >> command;
        try
        {
            if (command == "logits")
            {
                logits.clear();
                while (words >> word)
                    logits.push_back(std::strtof(word.c_str(), nullptr));
            }
            else if (command == "pick")
            {
                edgeattn::Sampling sampling;
                std::uint64_t index = 0;
                words >> word;
                sampling.temperature = std::strtod(word.c_str(), nullptr);
                words >> sampling.top_k >> word >> sampling.seed >> index;
                sampling.top_p = std::strtod(word.c_str(), nullptr);
                std::printf("%lld\n", static_cast<long long>(sampling.pick(logits.data(), logits.size(), index)));
            }
            else if (command == "exp")
            {
                words >> word;
                std::printf("%a\n", edgeattn::exp(std::strtod(word.c_str(), nullptr)));
            }
            else
            {
                std::uint64_t seed = 0, index = 0;
                words >> seed >> index;
                std::printf("%a\n", edgeattn::uniform(seed, index));
            }
        }
        catch (edgeattn::Error const& error)
        {
            std::printf("%d %s\n", static_cast<int>(error.code()), error.what());
        }
    }
}
