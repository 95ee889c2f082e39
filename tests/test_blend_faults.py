"""What goes wrong with one chunk while a prompt is blended costs that request time, and nothing else."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref

import pytest
import torch

from ragkv.errors import RemoteError
from ragkv.selection import STRATEGIES
from ragkv.store.header import unpack_header
from ragkv.store.source import FileSource
from tests.blend_kit import Desk
from tests.engine_kit import DOCUMENTS, QUESTION, Probe, eventually, in_threads, wait_idle
from tests.remote_kit import FakeTier
from tests.store_kit import flip

LAYERS = 4
RATIO = 0.3
DEADLINE_S = 0.15
FAULTS = ("corrupt", "vanished", "late", "failing")


class FaultyTier(FakeTier):
    """Goes wrong with one entry, from one of its layers on."""

    def __init__(self) -> None:
        super().__init__()
        self.fault = ""
        self.key, self.layer = b"", 0
        self.release = threading.Event()

    def get(self, key: bytes, offset: int, buffer: memoryview) -> bool:
        if key == self.key and offset >= unpack_header(self.objects[key][:4096], None).slabs[self.layer].offset:
            if self.fault == "late":
                self.release.wait(20)
            elif self.fault == "vanished":
                return False
            elif self.fault == "failing":
                raise RemoteError("the plug is out")
        return super().get(key, offset, buffer)


@contextlib.contextmanager
def opened(root, tier=None):
    desk = Desk(root, remote=tier)
    desk.caches = []
    new_kv = desk.runner.new_kv

    def watched(*args, **options):
        kv = new_kv(*args, **options)
        desk.caches.append(weakref.ref(kv))
        return kv

    desk.runner.new_kv = watched
    if tier is not None:
        desk.store._remote._transfer_timeout = DEADLINE_S
    yield desk
    if tier is not None:
        tier.release.set()
    desk.store.close()


def prompt(desk, count=3):
    """Chunks of documents of their own, none of which knows the others; all may be repaired."""
    return [desk.document(f"d{i}", tokens)[0] for i, tokens in enumerate((23, 18, 11, 14, 9)[:count])]


def everything(desk, result):
    length = int(result.kv.capacity) - 4  # but the room for what will be generated
    return torch.stack([torch.stack(result.kv.read(layer, length)) for layer in range(LAYERS)])


def reported(outcome):
    return outcome.kv, outcome.repaired_tokens, outcome.token_layers


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """What a strategy makes of the prompt if some of its chunks were never stored: logits, KV, outcomes."""
    known = {}

    def make(strategy, missing=(1,), count=3):
        name = (strategy, missing, count)
        if name not in known:
            with opened(tmp_path_factory.mktemp("without")) as desk:
                chunks = prompt(desk, count)
                desk.put(*[chunk for i, chunk in enumerate(chunks) if i not in missing])
                result = desk.run(desk.plan(*chunks), strategy, RATIO)
                known[name] = result.logits, everything(desk, result), result.outcomes
        return known[name]

    return make


def damage(store, key, layer):
    [entry] = store.open([key])
    with entry:
        offset = entry.header.slabs[layer].offset
    flip(store.folder.root / "entries" / key.hex()[:2] / f"{key.hex()}.kv", offset * 8 + 99)


def spoil(desk, tier, chunk, fault, layer):
    if fault == "corrupt":
        damage(desk.store, chunk.tokens.key, layer)
        return
    assert desk.store.drain(20)
    assert desk.store._delete_here([chunk.tokens.key]) == 1
    tier.fault, tier.key, tier.layer = fault, chunk.tokens.key, layer


def own_threads():
    """Those that are not kept for whoever comes next."""
    return sum(not thread.name.startswith("ragkv-words") for thread in threading.enumerate())


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_chunk_that_is_lost_on_the_way_is_as_one_never_stored(tmp_path, without, strategy, fault, layer):
    threads = own_threads()
    with contextlib.closing(FaultyTier()) as tier, opened(tmp_path, tier) as desk:
        chunks = prompt(desk)
        desk.put(*chunks)
        spoil(desk, tier, chunks[1], fault, layer)
        plan = desk.plan(*chunks)
        result = desk.run(plan, strategy, RATIO)
        logits, kv, outcomes = without(strategy)
        assert torch.equal(result.logits, logits)
        assert torch.equal(everything(desk, result), kv)
        assert [reported(outcome) for outcome in result.outcomes] == [reported(outcome) for outcome in outcomes]
        assert [outcome.why is None for outcome in result.outcomes] == [True, False, True]
        assert "unreadable" in result.outcomes[1].why
        assert [span.chunk for span in result.to_encode] == [chunks[1]]
        # Of the KV of the attempt that failed nothing is left, and nobody waits for a collector.
        assert [cache() for cache in desk.caches if cache() is not None] == [result.kv]
        assert desk.free(chunks[0])
        assert desk.free(chunks[2])
    eventually(lambda: own_threads() <= threads)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chunks_that_are_lost_one_after_the_other_cost_one_attempt(tmp_path, without, strategy):
    """However many are lost, in whatever layers: what is wrong is found at once, not at an attempt each."""
    with opened(tmp_path) as desk:
        chunks = prompt(desk, 5)
        desk.put(*chunks)
        for layer, chunk in enumerate(chunks[:4]):
            damage(desk.store, chunk.tokens.key, layer)
        del desk.caches[:]
        result = desk.run(desk.plan(*chunks), strategy, RATIO)
        logits, kv, outcomes = without(strategy, (0, 1, 2, 3), 5)
        assert torch.equal(result.logits, logits)
        assert torch.equal(everything(desk, result), kv)
        assert [reported(outcome) for outcome in result.outcomes] == [reported(outcome) for outcome in outcomes]
        assert all("unreadable" in outcome.why for outcome in result.outcomes[:4])
        # Of every attempt, and of what `links` looks ahead with.
        assert len(desk.caches) == (4 if strategy == "links" else 2)


def test_what_is_read_to_find_all_that_is_lost_is_not_read_again(tmp_path):
    """The attempt that follows finds the sound chunks in memory."""
    desk = Desk(tmp_path, ram_bytes=2**24)
    chunks = prompt(desk)
    desk.put(*chunks)
    damage(desk.store, chunks[1].tokens.key, 1)
    result = desk.run(desk.plan(*chunks), "epic", RATIO)
    assert [outcome.kv for outcome in result.outcomes] == ["ram", "computed", "ram"]
    desk.store.close()


def test_a_request_that_is_cancelled_while_it_looks_for_what_is_lost_leaves_no_lease(tmp_path):
    with opened(tmp_path) as desk:
        chunks = prompt(desk)
        desk.put(*chunks)
        damage(desk.store, chunks[1].tokens.key, 1)
        steps = desk.prefill(desk.plan(*chunks), "epic", RATIO).run()
        with torch.inference_mode():
            next(steps)  # layer 0
            next(steps)  # the loss is known, and others may be
            steps.close()
        assert not [cache for cache in desk.caches if cache() is not None]
        assert desk.free(chunks[0])
        assert desk.free(chunks[2])


# Through the engine

QUESTIONS = [{"question": QUESTION, "collection": "c", "filters": {"initial": letter}, "top_k": 4} for letter in "ABC"]


@pytest.fixture
def engine(make_engine):
    engine = make_engine(ram_bytes=0, controller="off", max_running=4)
    engine.ingest("c", DOCUMENTS)
    return engine


def asking(engine, question, method):
    options = {**question, "method": method, "ratio": RATIO, "max_tokens": 6}
    return lambda: engine.query(options["question"], **{k: v for k, v in options.items() if k != "question"})


def said(answer):
    """What an answer and its report say, but for the reasons and the tier."""
    return answer.text, [(c.kv == "computed", c.repaired_tokens, c.recomputed_token_layers) for c in answer.sources]


def key_of(engine, question, number):
    """The store's key of one of the chunks that a question is answered from."""
    asked = []
    store_open = engine._store.open
    engine._store.open = lambda keys: asked.append(keys) or store_open(keys)
    asking(engine, question, "none")()
    del engine._store.open
    return asked[0][number]


@pytest.mark.parametrize(("method", "layer"), [("question", 0), ("hkvd", 1), ("epic", LAYERS - 1)])
def test_an_engine_serves_on_as_if_the_lost_chunk_had_never_been_stored(engine, method, layer):
    store = engine._store
    calls = [asking(engine, question, method) for question in QUESTIONS]
    undisturbed = [call() for call in calls]
    key = key_of(engine, QUESTIONS[1], 1)
    assert store.delete([key]) == 1
    missing = calls[1]()
    wait_idle(engine)  # it is encoded again
    assert said(calls[1]()) == said(undisturbed[1])

    damage(store, key, layer)
    probe = Probe(engine)
    with in_threads(*calls) as answers:
        pass
    assert said(answers[0]) == said(undisturbed[0])
    assert said(answers[2]) == said(undisturbed[2])
    assert said(answers[1]) == said(missing)
    unreadable = [chunk.why is not None and "unreadable" in chunk.why for chunk in answers[1].sources]
    assert unreadable == [number == 1 for number in range(len(unreadable))]
    wait_idle(engine)
    assert said(calls[1]()) == said(undisturbed[1])  # and again
    wait_idle(engine)
    del answers
    eventually(probe.all_released)
    engine.cache_clear()
    assert store.stats().entries == 0  # no lease is left


def test_a_layer_that_comes_late_but_comes_changes_nothing(engine, monkeypatch):
    calls = [asking(engine, question, "hkvd") for question in QUESTIONS]
    undisturbed = [call() for call in calls]
    key = key_of(engine, QUESTIONS[1], 0)
    slab = FileSource.slab

    def slowly(source, layer, buffer):
        if source.header.key == key and layer == 2:
            time.sleep(0.2)
        return slab(source, layer, buffer)

    monkeypatch.setattr(FileSource, "slab", slowly)
    with in_threads(*calls) as answers:
        pass
    assert list(map(said, answers)) == list(map(said, undisturbed))
