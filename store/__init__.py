"""ragkv.store."""
