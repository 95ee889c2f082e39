"""ragkv.server."""
