//! What a session needs to know of its bundle's model.
#pragma once

#include "edgeattn/bundle.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace edgeattn
{

struct DecoderFacts
{
    int64_t vocabulary;
    int64_t context; //!< most tokens of a row
    bool last_only;  //!< the graph keeps the logits of the last position alone
    std::vector<int64_t> stop_tokens;
};

struct EncoderFacts
{
    int64_t vocabulary = 0;          //!< 0 for images
    int64_t token_types = 0;         //!< 0 where the family does not tell
    int64_t context = 0;             //!< most tokens of a row
    std::vector<int64_t> image_size; //!< channels, height and width; empty for texts
};

//! \throws Error kBundle: it is an encoder, or its files do not say.
DecoderFacts decoder_facts(Bundle const& bundle);

//! \throws Error kBundle: it is a decoder, or its files do not say.
EncoderFacts encoder_facts(Bundle const& bundle);

} // namespace edgeattn
