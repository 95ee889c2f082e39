"""ragkv."""
