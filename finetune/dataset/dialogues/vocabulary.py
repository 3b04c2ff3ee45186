"""A small vocabulary of our own: byte-level BPE trained on generated dialogues as the server renders them.

Cut into words as `tokenizer.ggml.pre = "smollm"` says (digits one by one, then GPT-2's pattern), which our server and
llama.cpp both know: a number in an argument is the digits of the request, whatever stands around it. The markers of
turns are control tokens; those of thinking and of tool calls are user-defined ones, as Qwen's files have them, so that
text keeps them. Deterministic: equal texts in equal order give equal bytes. Not here: weights, the GGUF file.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from finetune.dataset.dialogues.examples import Dialogue, turns
from finetune.dataset.dialogues.scenarios import HERE
from finetune.dataset.errors import DialogueError
from finetune.dataset.render import Renderer, chat_request
from finetune.dataset.token_classes import ClassWeights
from finetune.packed import Example
from quant.gguf_metadata import BPEVocabulary
from quant.model_types import TokenizerSource
from server.text import pretokenizers
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import build_tokenizer
from server.text.vocabulary import BYTE_OF_CHAR, TokenKind

PRE = "smollm"
SIZE = 4096
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_SPECIAL = (*CONTROL, *MARKERS)
_TYPES = {**dict.fromkeys(CONTROL, TokenKind.CONTROL), **dict.fromkeys(MARKERS, TokenKind.USER_DEFINED)}
MIN_FREQUENCY = 2


@cache
def chat_template() -> str:
    return (HERE / "chat_template.jinja").read_text("utf-8")


@dataclass(frozen=True, slots=True)
class SmallVocabulary:
    """Tokens in id order (special ones, then the 256 bytes, then merges), and the merges ("left right")."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]

    def described(self) -> BPEVocabulary:
        """As our GGUF writer takes it."""
        return BPEVocabulary(
            tokens=list(self.tokens),
            merges=list(self.merges),
            token_types=[int(_TYPES.get(token, TokenKind.NORMAL)) for token in self.tokens],
            pre=PRE,
            bos_id=_SPECIAL.index("<|im_start|>"),
            eos_id=_SPECIAL.index("<|im_end|>"),
            padding_id=_SPECIAL.index("<|endoftext|>"),
            chat_template=chat_template(),
        )

    def metadata(self) -> dict[str, Any]:
        """Every `tokenizer.*` key of a GGUF file, without that prefix, as `TokenizerSource` has them."""
        return {key.removeprefix("tokenizer."): value for key, value in self.described().metadata().items()}

    def renderer(self, base_digest: str = "") -> Renderer:
        """The server's own template and tokenizer code over this vocabulary."""
        tokenizer = build_tokenizer(TokenizerSource("gguf", self.metadata()), len(self.tokens))
        return Renderer(tokenizer, chat_template(), base_digest)

    def save(self, path: Path) -> None:
        document = {"pre": PRE, "tokens": self.tokens, "merges": self.merges}
        path.write_text(json.dumps(document, ensure_ascii=False, indent=0) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            document = json.loads(path.read_text("utf-8"))
            if document["pre"] != PRE:
                raise DialogueError(f"{path}: the words are cut as '{document['pre']}' says, not '{PRE}'")
            return cls(tuple(document["tokens"]), tuple(document["merges"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DialogueError(f"{path} is no vocabulary: {error!r}") from None


def train_vocabulary(dialogues: Iterable[Dialogue], size: int = SIZE) -> SmallVocabulary:
    """From training dialogues only: words of held-out families are for the test. Raises DialogueError."""
    smallest = len(_SPECIAL) + 256
    if size <= smallest:
        raise DialogueError(f"a vocabulary needs more than the {smallest} special tokens and bytes, not {size}")
    library = Library(models.BPE())
    library.pre_tokenizer = pretokenizers.build(pretokenizers.pre_tokenizer(PRE))
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(_SPECIAL),
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_texts(dialogues), trainer)
    model = json.loads(library.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(learned) < size - len(_SPECIAL):
        raise DialogueError(
            f"the dialogues give only {len(learned) + len(_SPECIAL)} tokens, not {size}; make more of them"
        )
    assert set(learned[:256]) == set(BYTE_OF_CHAR)
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    return SmallVocabulary((*_SPECIAL, *learned), tuple(merges))


def _texts(dialogues: Iterable[Dialogue]) -> Iterator[str]:
    """What is rendered, without the markers, which are tokens of their own and join with nothing."""
    template = ChatTemplate(chat_template(), bos_token="<|im_start|>", eos_token="<|im_end|>")
    for dialogue in dialogues:
        text = template.render(dialogue.messages, tools=dialogue.tools, add_generation_prompt=False)
        for marker in _SPECIAL:
            text = text.replace(marker, "\x00")
        yield from (piece for piece in text.split("\x00") if piece)


def tokenize(renderer: Renderer, dialogue: Dialogue, weights: ClassWeights | None = None) -> list[Example]:
    """One example a turn, as the trainer takes them: loss on the assistant's tokens of that turn alone.

    A later turn's prompt begins with the earlier turn (unless it thinks), so that packing shares their rows. Raises
    UnrenderableError.
    """
    table = (weights or ClassWeights()).table()
    return [_example(renderer, dialogue, number, turn.request, turn.message, table)
            for number, turn in enumerate(turns(dialogue))]  # fmt: skip


def _example(
    renderer: Renderer,
    dialogue: Dialogue,
    number: int,
    request: Mapping[str, Any],
    message: Mapping[str, Any],
    table: NDArray[np.float32],
) -> Example:
    rendered = renderer.answer(chat_request(request), message)
    answer = table[rendered.classes]
    return Example(
        id=f"{dialogue.id}:{number}",
        token_ids=np.array([*rendered.prompt_ids, *rendered.answer_ids], np.int32),
        weights=np.concatenate([np.zeros(len(rendered.prompt_ids), np.float32), answer]).astype(np.float32),
        cluster=dialogue.template,
        is_call=bool(message.get("tool_calls")) if dialogue.tools else None,
    )
