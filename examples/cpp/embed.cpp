// Compares texts with the first of them: a line of token ids in for each, a cosine similarity out. text.py makes ids:
//
//     python text.py BUNDLE encode "A cat sat." "A kitten rests." | build/embed BUNDLE
#include <algorithm>
#include <edgeattn/encoder_session.hpp>
#include <iostream>
#include <iterator>
#include <numeric>
#include <sstream>

int main(int count, char** words)
try
{
    edgeattn::EncoderSession session = edgeattn::EncoderSession::open(count > 1 ? words[1] : "bundle");
    std::vector<float> first;
    for (std::string line; std::getline(std::cin, line);)
    {
        std::istringstream ids(line);
        std::vector<int64_t> const tokens{std::istream_iterator<int64_t>(ids), {}};
        edgeattn::Encoding const found = session.run(tokens.data(), 1, static_cast<int64_t>(tokens.size()));
        std::vector<float> const vector(found.data, found.data + found.shape.back()); // of length 1
        first = first.empty() ? vector : first;
        std::cout << std::inner_product(first.begin(), first.end(), vector.begin(), 0.0F) << std::endl;
    }
}
catch (edgeattn::Error const& error)
{
    std::cerr << "embed: " << error.what() << '\n';
    return 1;
}
