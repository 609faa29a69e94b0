"""Text to token ids and back, for the C++ examples beside it.

    python text.py BUNDLE encode "Once upon a time" ["another text" ...]   # a line of ids each
    python text.py BUNDLE decode                                           # ids on standard input

It takes pip install 'edgeattn[ort]'.
"""

import sys

from edgeattn.bundle.bundle import Bundle
from edgeattn.runtime.text import Text

text = Text.open(Bundle.open(sys.argv[1]))
if sys.argv[2] == "encode":
    for given in sys.argv[3:]:
        print(*text.encode(given))
else:
    print(text.decode([int(token) for token in sys.stdin.read().split()]))
