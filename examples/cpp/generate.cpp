// Continues a prompt, token by token. Tokens go in and come out as ids; text.py turns text into them and back:
//
//     python text.py BUNDLE encode "Once upon a time" | build/generate BUNDLE | python text.py BUNDLE decode
#include <cstdlib>
#include <edgeattn/generator.hpp>
#include <iostream>
#include <iterator>

int main(int count, char** words)
try
{
    edgeattn::Session session = edgeattn::Session::open(count > 1 ? words[1] : "bundle");
    std::vector<int64_t> const prompt{std::istream_iterator<int64_t>(std::cin), {}};
    edgeattn::GeneratorOptions options;
    options.max_new_tokens = count > 2 ? std::atoll(words[2]) : 64;
    edgeattn::Generator(session).generate(prompt, options, [](int64_t token) {
        std::cout << token << std::endl;
        return bool(std::cout);
    });
}
catch (edgeattn::Error const& error)
{
    std::cerr << "generate: " << error.what() << '\n';
    return 1;
}
