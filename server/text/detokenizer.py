"""Incremental detokenizer: token ids in, complete characters out.

The concatenation of all `push` results and `flush` is `Tokenizer.decode` of all ids. A character whose bytes are
spread over tokens comes out with its last byte; bytes that can no longer become UTF-8 come out as U+FFFD. Works on
the tokens' bytes (about 1 µs a token) instead of decoding a window of tokens again and again.
"""

import codecs
from collections.abc import Sequence

from server.text.tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence.

    `at_start` False (the default) is for generated tokens: they continue a prompt, so a leading space is theirs.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, *, at_start: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._is_special = tokenizer.is_special
        self._skip_special = skip_special
        self._drops_space = at_start and tokenizer.has_prefix_space
        self._decoder = _new_decoder("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        if self._skip_special:
            data = b"".join([self._token_bytes(i) for i in token_ids if not self._is_special(i)])
        else:
            data = b"".join([self._token_bytes(i) for i in token_ids])
        if self._drops_space and data:
            data = data.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD for the torn tail of a character, if there is one; call once, after the last token."""
        return self._decoder.decode(b"", final=True)
