"""What a user may import, frozen: changing this list is a decision, not an accident."""

from __future__ import annotations

import importlib
import inspect

import pytest

import ragkv
from ragkv import errors

PUBLIC = {
    "ragkv": """Answer AsyncClient Client Document DoneEvent Engine QueryRequest RagkvError Settings SourcesEvent
        TokenEvent __version__ load_settings""",
    "ragkv.store": """CODECS CheckReport ChunkStore Codec EntryHeader EntryInfo FORMAT_VERSION Field Geometry KEY_BYTES
        LayerReader OpenEntry SOURCES Slab StoreStats chunk_key""",
    "ragkv.retrievers": """AddReport Catalog Chunk Collection CollectionStats Document DocumentInfo Embedder Filters
        Hit KNOWN_TYPES Metadata Mode Retriever SentenceTransformerEmbedder Splitter SvdEmbedder compile_filters
        load_bytes load_path make_embedder reciprocal_rank_fusion""",
    "ragkv.server": "EngineAPI bind create_app serve url_of",
}
EXCEPTIONS = {
    "RagkvError": "error",
    "ConfigError": "config",
    "InputError": "input",
    "DocumentError": "document",
    "FilterError": "filter",
    "PromptTooLongError": "prompt_too_long",
    "NotFoundError": "not_found",
    "ModelError": "model",
    "NotAModelError": "not_a_model",
    "UnsupportedArchitectureError": "unsupported_architecture",
    "StoreError": "store",
    "StoreFormatError": "store_format",
    "StoreFullError": "store_full",
    "StoreReadOnlyError": "store_read_only",
    "CorruptEntryError": "corrupt_entry",
    "MissingEntryError": "missing_entry",
    "RemoteError": "remote",
    "RemoteRefusedError": "remote_refused",
    "CollectionError": "collection",
    "MissingExtraError": "missing_extra",
    "QueueFullError": "queue_full",
    "CancelledError": "cancelled",
    "EngineClosedError": "engine_closed",
    "ServerError": "server",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these_and_all_exist(module):
    imported = importlib.import_module(module)
    assert sorted(imported.__all__) == sorted(PUBLIC[module].split())
    for name in imported.__all__:
        assert getattr(imported, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        ragkv.nonsense  # noqa: B018


def test_every_error_and_its_code_on_the_wire():
    tree = {name: kind.code for name, kind in inspect.getmembers(errors, inspect.isclass)}
    assert tree == EXCEPTIONS


def test_the_docstring_draws_the_whole_tree():
    assert [name for name in EXCEPTIONS if name not in errors.__doc__] == []


def test_errors_carry_their_facts():
    error = errors.QueueFullError("full", limit=3)
    assert (str(error), error.message, error.context) == ("full", "full", {"limit": 3})
    assert isinstance(error, ragkv.RagkvError)
