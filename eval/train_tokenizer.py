"""Train the bundled model's tokenizer: byte-level BPE on invented worlds and general English.

    python -m ragkv.eval.train_tokenizer --out ragkv/demo/model --text passages.json ...

``--text`` files are read as UTF-8; the docstrings of Python's standard library are always added. The worlds'
share is kept small (a name occurs a handful of times) so that no invented name becomes a token of its own:
names of every split must break into the same kind of pieces.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ragkv.eval.worlds import make_world
from ragkv.eval.worlds_prompt import BOS, CHAT_TEMPLATE, END, PAD, START, chunk_text, question_text

SPECIAL = [BOS, START, END, PAD, *(f"<|reserved_{i}|>" for i in range(8))]
# GPT-4's splitting rule: words with their leading space, digits in groups of at most three.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of ``vocab_size`` entries, special tokens first, that round-trips any UTF-8."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def world_texts(worlds: int) -> Iterator[str]:
    for seed in range(worlds):
        world = make_world(seed, "train", 12)
        for document in world.documents:
            yield from map(chunk_text, document.chunks)
        for question in world.questions:
            yield question_text(question.text)
            yield question.answer


def docstrings(limit: int) -> Iterator[str]:
    """Docstrings of the standard library's top-level modules, about ``limit`` characters."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text
                limit -= len(text)
        if limit < 0:
            return


def file_texts(path: Path) -> Iterator[str]:
    """A text file whole; of a JSON list of questions with ``ctxs`` (MuSiQue's form) the passages."""
    if path.suffix != ".json":
        yield path.read_text(encoding="utf-8")
        return
    for question in json.loads(path.read_text(encoding="utf-8")):
        yield from (passage["text"] for passage in question["ctxs"])


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, chat template included."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 16384,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model's tokenizer.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="general English, as much as there is")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--worlds", type=int, default=300)
    args = parser.parse_args()

    def texts() -> Iterator[str]:
        yield from world_texts(args.worlds)
        yield from docstrings(2_000_000)
        for path in args.text:
            yield from file_texts(path)

    save(train(texts(), args.vocab), args.out)


if __name__ == "__main__":
    main()
