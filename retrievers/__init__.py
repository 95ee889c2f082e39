"""ragkv.retrievers."""
