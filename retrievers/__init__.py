"""Text in, ranked chunks out: loading, splitting, indexing and searching documents.

catalog = Catalog("collections", Splitter(count_tokens, max_tokens=128))
papers = catalog.get_or_create("papers")
papers.add(load_path("papers/"))
hits = papers.retrieve("who wrote the first one?", k=5, filters={"lang": "en"})
"""

from ragkv.retrievers.catalog import Catalog
from ragkv.retrievers.collection import AddReport, Collection, CollectionStats, Mode
from ragkv.retrievers.database import DocumentInfo
from ragkv.retrievers.embedders import Embedder, SentenceTransformerEmbedder, SvdEmbedder, make_embedder
from ragkv.retrievers.filters import Filters, compile_filters
from ragkv.retrievers.fusion import reciprocal_rank_fusion
from ragkv.retrievers.loaders import KNOWN_TYPES, load_bytes, load_path
from ragkv.retrievers.splitter import Splitter
from ragkv.retrievers.types import Chunk, Document, Hit, Metadata, Retriever

__all__ = [
    "KNOWN_TYPES",
    "AddReport",
    "Catalog",
    "Chunk",
    "Collection",
    "CollectionStats",
    "Document",
    "DocumentInfo",
    "Embedder",
    "Filters",
    "Hit",
    "Metadata",
    "Mode",
    "Retriever",
    "SentenceTransformerEmbedder",
    "Splitter",
    "SvdEmbedder",
    "compile_filters",
    "load_bytes",
    "load_path",
    "make_embedder",
    "reciprocal_rank_fusion",
]
