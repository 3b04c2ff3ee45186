// Prompt lookup: where the last tokens of a sequence occurred before. Saxena 2023, "Prompt Lookup Decoding".
#pragma once

#include <cstdint>

namespace sterna {

struct Match {
  int at = -1;     // index of the token that followed, -1: nothing matches
  int length = 0;  // tokens before it that equal the last ones, at most max_length
};

// The longest match, and of equally long ones the latest. One pass over int32 values, about 0.3 ns each: a context of
// 8,192 tokens takes 3 us, so no index is kept.
inline Match find_match(const int32_t* tokens, int count, int min_length, int max_length) {
  Match best;
  if (count < 1) return best;
  const int32_t last = tokens[count - 1];
  for (int at = count - 1; at >= 1 && best.length < max_length; --at) {
    if (tokens[at - 1] != last) continue;
    const int most = at < max_length ? at : max_length;
    int length = 1;
    while (length < most && tokens[at - 1 - length] == tokens[count - 1 - length]) ++length;
    if (length > best.length && length >= min_length) best = {at, length};
  }
  return best;
}

}  // namespace sterna
