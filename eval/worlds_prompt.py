"""The bundled model's prompt, segment by segment: the one place that knows its wording.

Every segment is tokenised alone and the ids are joined, as in the core: a template piece, the system text,
a template piece, each chunk followed by a blank line, the question, a template piece. Special tokens come
from the pieces only.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ragkv.eval.worlds import World, WorldDocument
from ragkv.eval.worlds_names import Dice

BOS, START, END, PAD = "<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SYSTEM = "Answer the question from the documents. Reply with the answer only."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class PromptIds:
    """Token ids of the fixed pieces, and of texts. ``text`` treats its input as plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos = self._special(BOS)
        self.end = self._special(END)
        start = self._special(START)
        to_user = [self.end, *self.text("\n"), start, *self.text("user\n")]
        self.system = [self.bos, start, *self.text("system\n"), *self.text(SYSTEM), *to_user]
        self.no_system = [self.bos, start, *self.text("user\n")]
        self.to_answer = [self.end, *self.text("\n"), start, *self.text("assistant\n")]
        self.next_turn = to_user

    def _special(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no {token}; train it with ragkv.eval.train_tokenizer")
        return int(number)

    def text(self, text: str) -> list[int]:
        return self.texts([text])[0]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def prompt(self, chunks: Sequence[str], question: str) -> list[int]:
        """Ids of a whole prompt, up to where the answer begins."""
        context = [i for ids in self.texts([chunk_text(c) for c in chunks]) for i in ids]
        return [*self.system, *context, *self.text(question_text(question)), *self.to_answer]


def chunk_text(chunk: str) -> str:
    return chunk + "\n\n"


def question_text(question: str) -> str:
    return "Question: " + question


def context_chunks(world: World, dice: Dice, drop: float = 0.0, shuffle: bool = True) -> list[tuple[str, int, str]]:
    """(document id, chunk number, text) in prompt order: documents shuffled, or as they are, their chunks in order.

    Each chunk is left out with probability ``drop``.
    """
    order: list[WorldDocument] = dice.shuffled(world.documents) if shuffle else world.documents
    chunks = [(d.id, number, text) for d in order for number, text in enumerate(d.chunks)]
    return [chunk for chunk in chunks if not drop or dice.random() >= drop]
