"""Continues a prompt, token by token.

    python generate.py BUNDLE "Once upon a time" [TOKENS]

It takes pip install 'edgeattn[ort]'.
"""

import sys

from edgeattn.runtime import Session, stream

session = Session.open(sys.argv[1])
most = int(sys.argv[3]) if len(sys.argv) > 3 else 64
for token in stream(session, sys.argv[2], max_new_tokens=most):
    print(token.text, end="", flush=True)
print()
