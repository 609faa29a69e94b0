"""Says how near texts are to the first one.

    python embed.py BUNDLE "a cat" "a kitten" "a tax form"

The bundle is of an encoder exported with --task embedding; it takes pip install 'edgeattn[ort]'.
"""

import sys

from edgeattn.runtime import EncoderSession

texts = sys.argv[2:]
vectors = EncoderSession.open(sys.argv[1]).embed(texts)  # [texts, hidden], of length 1
for text, nearness in zip(texts, vectors @ vectors[0], strict=True):
    print(f"{nearness:.4f}  {text}")
