"""Invented worlds: deterministic, disjoint between splits, and true to their own documents."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import ragkv
from ragkv.config import DEFAULT_SYSTEM_PROMPT
from ragkv.eval.muon import Muon
from ragkv.eval.train_data import LevelOf, SampleMaker, scoring_rows, training_rows
from ragkv.eval.train_demo import to_batch
from ragkv.eval.train_model import BLOCK, DemoModel, Rows, Shape, block_kinds, dense_mask, save
from ragkv.eval.train_tokenizer import SPECIAL, train
from ragkv.eval.worlds import KINDS, World, make_world
from ragkv.eval.worlds_names import NAME_KINDS, SPLITS, Dice, atlas, names
from ragkv.eval.worlds_prompt import PromptIds, context_chunks
from ragkv.tokenizer import Tokenizer as CoreTokenizer
from ragkv.tokenizer import chunk_text, question_text

PINNED = ["e20c550e9a945bab", "f6e11215d3fd7f9f", "cd6cd10d9d53902a"]
MODEL = Path(ragkv.__file__).parent / "demo" / "model"
TINY = Shape(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             intermediate_size=32)  # fmt: skip


@pytest.fixture(scope="module")
def maker() -> SampleMaker:
    return SampleMaker(MODEL / "tokenizer.json")


def _hash(world: World) -> str:
    return hashlib.sha256(json.dumps(asdict(world)).encode()).hexdigest()[:16]


def test_worlds_are_the_same_on_every_machine_and_python() -> None:
    assert [_hash(make_world(7, split, 14)) for split in SPLITS] == PINNED
    assert make_world(7, "dev", 14) == make_world(7, "dev", 14)
    assert make_world(7, "dev", 14) != make_world(8, "dev", 14)


def test_splits_share_no_names() -> None:
    owner: dict[str, tuple[str, str]] = {}
    for kind in NAME_KINDS:
        for split in SPLITS:
            for name in names(kind, split):
                assert owner.setdefault(name, (kind, split)) == (kind, split)
    assert not owner.keys() & atlas().keys()


def test_every_kind_occurs_in_equal_numbers_in_large_worlds() -> None:
    kinds = [question.kind for question in make_world(3, "test", 60, per_kind=8).questions]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 8)


@pytest.mark.parametrize("size", [3, 8, 14, 40])
def test_answers_follow_from_the_evidence(size: int) -> None:
    for seed in range(15):
        world = make_world(seed, "train", size)
        text = {(d.id, number): chunk for d in world.documents for number, chunk in enumerate(d.chunks)}
        for question in world.questions:
            evidence = "\n".join(text[place] for place in question.evidence)
            assert (question.answer in evidence) == (question.kind != "memory"), question
            # Without the last piece of evidence the answer of a two-document question cannot be read off.
            if question.kind in ("gloss", "update"):
                assert question.answer in text[question.evidence[-1]]


def test_notices_name_the_file_and_never_its_subject() -> None:
    world = make_world(4, "dev", 30, per_kind=20)
    text = {(d.id, number): chunk for d in world.documents for number, chunk in enumerate(d.chunks)}
    updates = [question for question in world.questions if question.kind == "update"]
    assert len(updates) >= 8
    for question in updates:
        document, notice = question.evidence
        files = [link for link in world.links if link.places == (document, notice)]
        assert any(link.tells[0] in question.text and link.tells[1] == question.answer for link in files)
        assert not any(link.tells[0] in text[notice] for link in files)


def test_links_tell_what_stands_at_their_places() -> None:
    world = make_world(6, "train", 40)
    text = {(d.id, number): chunk for d in world.documents for number, chunk in enumerate(d.chunks)}
    whole = {d.id: "\n".join(d.chunks) for d in world.documents}
    assert len(world.links) > 20
    for link in world.links:
        assert all(link.word in text[place] for place in link.places)
        assert link.tells[0] in whole[link.places[0][0]]
        assert link.tells[1] in text[link.places[1]]


def test_a_correction_replaces_the_old_value_in_every_question() -> None:
    world = make_world(5, "test", 30, per_kind=100)
    asked: dict[str, set[str]] = {}
    for question in world.questions:
        asked.setdefault(question.text.replace(" now?", "?"), set()).add(question.answer)
    assert all(len(answers) == 1 for answers in asked.values())


def test_the_atlas_is_in_no_document() -> None:
    countries = set(atlas().values())
    world = make_world(2, "dev", 60)
    assert not [c for d in world.documents for chunk in d.chunks for c in countries if c in chunk]


def test_dropped_chunks_keep_the_rest_in_document_order() -> None:
    world = make_world(1, "dev", 30)
    kept = [(doc, number) for doc, number, _ in context_chunks(world, Dice("x"), drop=0.4)]
    every = {(d.id, number) for d in world.documents for number in range(len(d.chunks))}
    assert set(kept) < every
    for document in world.documents:
        numbers = [number for doc, number in kept if doc == document.id]
        assert numbers == sorted(numbers)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train, dev, test"):
        make_world(1, "validation")  # type: ignore[arg-type]


def test_a_trained_tokenizer_round_trips_any_text() -> None:
    tokenizer = train(iter(["some text, and 1234 more"] * 9), 300)
    for text in ("naïve — 日本 😀\r\n\t x", "\x00\x7f\ufeff", "<|im_end|"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))


def test_bundled_prompt_equals_its_chat_template(maker: SampleMaker) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = maker.ids.prompt(["Alder\nAlder is old.", "It is also tall."], "How old is Alder?")
    user = "Alder\nAlder is old.\n\nIt is also tall.\n\nQuestion: How old is Alder?"
    system = "Answer the question from the documents. Reply with the answer only."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert Tokenizer.from_file(str(MODEL / "tokenizer.json")).decode(prompt, skip_special_tokens=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (prompt[0], maker.ids.end)


def test_prompt_needs_its_special_tokens() -> None:
    with pytest.raises(ValueError, match="bos"):
        PromptIds(Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}})))


def test_block_mask_covers_the_dense_mask(maker: SampleMaker) -> None:
    rows = to_batch(scoring_rows(maker, "dev", 6, 8, 3, 4096)[:2], torch.device("cpu")).rows
    blocks = rows.ids.shape[1] // BLOCK
    dense = dense_mask(rows).view(2, 1, blocks, BLOCK, blocks, BLOCK).transpose(3, 4).flatten(4)
    partial, full = block_kinds(rows)
    assert not (dense.any(-1) & ~(partial | full)).any()
    assert dense.all(-1)[full].all()
    assert not (partial & full).any()


def test_packed_questions_see_their_context_and_nothing_else(maker: SampleMaker) -> None:
    """Logits of the second question equal those of its own prompt; another question's text has no say."""
    torch.manual_seed(0)
    model = DemoModel(TINY)
    sample = maker.scoring(make_world(0, "dev", 3, 2), 2)
    ids = [*sample.context, *sample.chains[1].ids]
    alone = Rows(*(torch.tensor([column]) for column in (ids, range(len(ids)), [0] * len(ids), [0] * len(ids))))
    batch = to_batch(scoring_rows(maker, "dev", 3, 1, 2, 2048), torch.device("cpu"))
    start = len(sample.context) + len(sample.chains[0].ids)
    at = torch.arange(start, start + len(sample.chains[1].ids))
    wrong = replace(batch.rows, turn=torch.zeros_like(batch.rows.turn))
    with torch.no_grad():
        hints = torch.arange(3, len(sample.context), 7)
        late = hints % 2 == 0
        expected, recalled = model(alone, torch.arange(len(sample.context), len(ids)), hints, late)
        got, got_recalled = model(batch.rows, at, hints, late)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got_recalled, recalled, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(wrong, at, hints, late)[0], expected, rtol=1e-4, atol=1e-5)


def test_training_rows_have_right_targets(maker: SampleMaker) -> None:
    class Level:
        value = 1

    row = next(training_rows(maker, 3, LevelOf(Level), 4096))
    used = row.weights > 0
    assert (row.tokens[0][row.losses[0][used] + 1] == row.losses[1][used]).all()
    answers = used & (row.losses[2] >= 0)
    assert answers.sum() > 50
    assert (row.tokens[3][row.losses[0][answers]] > 0).all()
    assert (row.tokens[3][row.losses[0][used & ~answers]] == 0).all()
    at, first, _, late = row.hints[:, row.hints[1] >= 0]
    assert 0 < late.sum() < len(late)
    assert ((row.tokens[3][at] > 0) == (late == 1)).all()
    assert (first > 0).all()


@pytest.mark.parametrize("shuffle", [False, True])
def test_links_are_asked_where_the_word_is_met_again(maker: SampleMaker, shuffle: bool) -> None:
    world = make_world(9, "train", 14)
    chunks = context_chunks(world, Dice("links"), shuffle=shuffle)
    sample = maker.context([maker.ids.bos], chunks, world.links)
    assert len(sample.links) == len(world.links)
    told = [(text, maker.ids.text(" " + text)) for link in world.links for text in link.tells]
    for at, (first, second) in sample.links:
        read = maker.ids.tokenizer.decode(sample.context[: at + 1])
        links = [link for link in world.links if read.endswith(link.word)]
        assert read.count(links[0].word) >= 2
        tells = {text for link in links for text in link.tells}
        assert any(text in tells and [first, second] == [*ids, -1][:2] for text, ids in told)


def test_a_bridge_is_asked_for_the_name_it_leads_over(maker: SampleMaker) -> None:
    world = make_world(9, "train", 14)
    bridges = {q.text: q for q in world.questions if q.kind == "bridge"}
    steps = 0
    for chain in maker.scoring(world, 4).chains:
        text = maker.ids.tokenizer.decode(chain.ids)
        question = next((q for t, q in bridges.items() if t in text), None)
        assert bool(chain.steps) == (question is not None)
        for at, (first, second) in chain.steps:
            assert at == chain.spans[0][0] - 1
            assert [first, second] == [*maker.ids.text(" " + question.via), -1][:2]
            steps += 1
    assert steps == 4


def test_our_muon_is_torchs() -> None:
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    fast = Muon(ours, lr=0.01)
    plain = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fast.step()
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_saved_model_is_the_librarys_model(tmp_path: Path) -> None:
    save(DemoModel(TINY), tmp_path)  # raises where the library's forward differs
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_the_model_was_trained_on_the_very_prompt_the_core_makes(maker: SampleMaker) -> None:
    """Training tokenises for itself, without the core; both must give the same ids."""
    chunks, question = ["Alder\nAlder is old.", "It is also tall."], "How old is Alder?"
    core = CoreTokenizer.load(MODEL)
    before, after = core.frame(DEFAULT_SYSTEM_PROMPT, [])
    context = [i for chunk in chunks for i in core.plain(chunk_text(chunk))]
    expected = [*before, *context, *core.plain(question_text(question)), *after]
    assert maker.ids.prompt(chunks, question) == expected
