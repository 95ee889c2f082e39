"""Every error ragkv raises on purpose, in one tree. A leaf: it imports nothing.

RagkvError
├── ConfigError               a setting, flag or environment variable is wrong
├── InputError                what the caller sent cannot be used (HTTP 422)
│   ├── DocumentError         a document is empty, too large, not text, of an unknown type
│   ├── FilterError           a metadata filter is malformed
│   └── PromptTooLongError    the question alone does not fit the model's context
├── NotFoundError             no such collection or document (HTTP 404)
├── ModelError                a checkpoint cannot be used
│   ├── NotAModelError        the path holds no Hugging Face checkpoint
│   └── UnsupportedArchitectureError
├── StoreError                the chunk store cannot be used
│   ├── StoreFormatError      written by another version, or not a ragkv store
│   ├── StoreFullError        the disk is full or the capacity is too small for one entry
│   ├── StoreReadOnlyError    the folder cannot be written
│   ├── MissingEntryError     the chunk is not in the store
│   ├── CorruptEntryError     bytes on disk do not match their checksum (served as a miss)
│   └── RemoteError           the remote tier cannot be reached, or not in time (served as a miss)
│       └── RemoteRefusedError   it answers, but not what was asked for: out of memory, no permission
├── CollectionError           a collection's files cannot be read or written
├── MissingExtraError         an optional package is needed; the message names the pip command
├── QueueFullError            the server has as much work as it accepts (HTTP 429)
├── CancelledError            the request was cancelled by its caller
├── EngineClosedError         the engine was closed while the request ran
└── ServerError               what the SDK raises for an error answer that has no closer type
"""

from __future__ import annotations


class RagkvError(Exception):
    """Base of every error ragkv raises on purpose.

    ``context`` holds the facts (chunk key, path, setting, value) as JSON-able values. ``code`` is the
    stable name used on the wire.
    """

    code = "error"

    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.context = context


class ConfigError(RagkvError):
    code = "config"


class InputError(RagkvError):
    code = "input"


class DocumentError(InputError):
    code = "document"


class FilterError(InputError):
    code = "filter"


class PromptTooLongError(InputError):
    code = "prompt_too_long"


class NotFoundError(RagkvError):
    code = "not_found"


class ModelError(RagkvError):
    code = "model"


class NotAModelError(ModelError):
    code = "not_a_model"


class UnsupportedArchitectureError(ModelError):
    code = "unsupported_architecture"


class StoreError(RagkvError):
    code = "store"


class StoreFormatError(StoreError):
    code = "store_format"


class StoreFullError(StoreError):
    code = "store_full"


class StoreReadOnlyError(StoreError):
    code = "store_read_only"


class MissingEntryError(StoreError):
    code = "missing_entry"


class CorruptEntryError(StoreError):
    code = "corrupt_entry"


class RemoteError(StoreError):
    code = "remote"


class RemoteRefusedError(RemoteError):
    code = "remote_refused"


class CollectionError(RagkvError):
    code = "collection"


class MissingExtraError(RagkvError):
    code = "missing_extra"


class QueueFullError(RagkvError):
    code = "queue_full"


class CancelledError(RagkvError):
    code = "cancelled"


class EngineClosedError(RagkvError):
    code = "engine_closed"


class ServerError(RagkvError):
    code = "server"
