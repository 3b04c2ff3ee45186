"""Tools that work on text: counting, case, order, cutting, joining and simple ciphers."""

from finetune.dataset.dialogues.tool import INTEGER, TEXT, Tool, ToolRefusal, choice, list_of, make_tool

_VOWELS = "aeiou"


def count_words(text: str) -> int:
    """Number of words in a text."""
    return len(text.split())


def count_characters(text: str) -> int:
    """Number of characters in a text, spaces included."""
    return len(text)


def count_letter(text: str, letter: str) -> int:
    """How often a letter occurs in a text."""
    if len(letter) != 1 or not letter.isalpha():
        raise ToolRefusal("exactly one letter is expected")
    return text.lower().count(letter.lower())


def count_vowels(text: str) -> int:
    """Number of vowels in a text."""
    return sum(char in _VOWELS for char in text.lower())


def reverse_text(text: str) -> str:
    """Reverse a text."""
    return text[::-1]


def is_palindrome(text: str) -> bool:
    """Whether a text reads the same backwards."""
    letters = [char for char in text.lower() if char.isalnum()]
    if not letters:
        raise ToolRefusal("the text has no letters")
    return letters == letters[::-1]


def change_case(text: str, style: str) -> str:
    """Change the letter case of a text."""
    if style == "snake":
        return "_".join(text.lower().split())
    return {"upper": text.upper(), "lower": text.lower(), "title": text.title()}[style]


def replace_text(text: str, old: str, new: str) -> str:
    """Replace words in a text."""
    if old not in text:
        raise ToolRefusal(f"the text does not contain '{old}'")
    return text.replace(old, new)


def sort_words(words: list[str], order: str = "ascending") -> list[str]:
    """Sort words by the alphabet."""
    if not words:
        raise ToolRefusal("the list is empty")
    return sorted(words, key=str.lower, reverse=order == "descending")


def join_words(words: list[str], separator: str) -> str:
    """Join words with a separator."""
    if len(words) < 2:
        raise ToolRefusal("at least two words are needed")
    return separator.join(words)


def split_text(text: str, separator: str) -> list[str]:
    """Split a text at a separator."""
    if separator not in text:
        raise ToolRefusal(f"the separator '{separator}' does not occur in the text")
    return [part.strip() for part in text.split(separator)]


def shorten_text(text: str, length: int) -> str:
    """Keep the first characters of a text."""
    if length < 1:
        raise ToolRefusal("the length must be at least 1")
    return text[:length]


def pick_word(text: str, position: int) -> str:
    """Word at a position, counted from 1."""
    words = text.split()
    if not 1 <= position <= len(words):
        raise ToolRefusal(f"the text has {len(words)} words, so there is no word {position}")
    return words[position - 1]


def caesar_shift(text: str, shift: int) -> str:
    """Shift letters in the alphabet."""
    if not -25 <= shift <= 25:
        raise ToolRefusal("the shift must lie between -25 and 25")
    return "".join(_shifted(char, shift) for char in text)


def _shifted(char: str, shift: int) -> str:
    if not (char.isascii() and char.isalpha()):
        return char
    first = ord("a" if char.islower() else "A")
    return chr(first + (ord(char) - first + shift) % 26)


def repeat_text(text: str, times: int) -> str:
    """Repeat a text several times."""
    if not 1 <= times <= 20:
        raise ToolRefusal("a text can be repeated 1 to 20 times")
    return " ".join([text] * times)


_CASES = choice("upper", "lower", "title", "snake")
_ORDER = {**choice("ascending", "descending"), "default": "ascending"}

TOOLS: tuple[Tool, ...] = (
    make_tool("text", "count words", count_words, text=TEXT),
    make_tool("text", "count characters", count_characters, text=TEXT),
    make_tool("text", "count letters", count_letter, text=TEXT, letter=TEXT),
    make_tool("text", "count vowels", count_vowels, text=TEXT),
    make_tool("text", "reverse text", reverse_text, text=TEXT),
    make_tool("text", "test for palindromes", is_palindrome, text=TEXT),
    make_tool("text", "change letter case", change_case, text=TEXT, style=_CASES),
    make_tool("text", "replace words", replace_text, text=TEXT, old=TEXT, new=TEXT),
    make_tool("text", "sort words", sort_words, words=list_of(TEXT), order=_ORDER),
    make_tool("text", "join words", join_words, words=list_of(TEXT), separator=TEXT),
    make_tool("text", "split text", split_text, text=TEXT, separator=TEXT),
    make_tool("text", "shorten text", shorten_text, text=TEXT, length=INTEGER),
    make_tool("text", "pick a word from a text", pick_word, text=TEXT, position=INTEGER),
    make_tool("text", "shift letters", caesar_shift, text=TEXT, shift=INTEGER),
    make_tool("text", "repeat text", repeat_text, text=TEXT, times=INTEGER),
)
