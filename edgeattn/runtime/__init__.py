"""The part an application embeds: open a bundle, run it, generate text, embed texts.

Light: numpy, and onnxruntime and tokenizers once a session is opened.
"""

from edgeattn.runtime.encoder import EncoderSession
from edgeattn.runtime.generate import Generation, Token, TokenStream, generate, stream
from edgeattn.runtime.perplexity import Evaluation, perplexity
from edgeattn.runtime.sampling import Sampling
from edgeattn.runtime.session import Session, State, Step
from edgeattn.runtime.text import Text, TextStream

__all__ = [
    "EncoderSession",
    "Evaluation",
    "Generation",
    "Sampling",
    "Session",
    "State",
    "Step",
    "Text",
    "TextStream",
    "Token",
    "TokenStream",
    "generate",
    "perplexity",
    "stream",
]
