"""ragkv.eval."""
