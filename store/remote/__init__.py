"""The remote tier: entries shared between machines, never waited for longer than a miss is worth."""

from ragkv.store.remote.client import Remote, RemoteStats
from ragkv.store.remote.source import RemoteSource
from ragkv.store.remote.tier import HEAD_BYTES, RemoteTier, connect

__all__ = ["HEAD_BYTES", "Remote", "RemoteSource", "RemoteStats", "RemoteTier", "connect"]
