"""Errors of object storage. They know nothing of our HTTP, and show neither credentials nor host paths.

StorageError
├── InvalidKey           not a key that every store can hold
├── InvalidContentType   not a media type that fits in a header
├── ForeignUrl           an image URL that does not name an object of ours; no connection was made
├── ObjectNotFound
├── ObjectTooLarge       more bytes than the caller allows; the rest was never read
├── StorageUnavailable   no usable answer, retries included; later may be better
├── StorageRefused       an answer that no retry mends: credentials, bucket, permission, or not S3 at all
└── StorageTimeout       no answer in time; whether a put took place is unknown
"""


class StorageError(Exception):
    """Base of all errors that object storage raises."""


class InvalidKey(StorageError):
    """Not a key that every store can hold: see `storage.keys`."""


class InvalidContentType(StorageError):
    """Not a media type that fits in a header."""


class ForeignUrl(StorageError):
    """An image URL that does not name an object of ours. No connection was made."""


class ObjectNotFound(StorageError):
    """The store has no such object."""


class ObjectTooLarge(StorageError):
    """The object has more bytes than the caller allows. The rest was never read."""


class StorageUnavailable(StorageError):
    """The store could not be reached or was overloaded, retries included. Later may be better.

    Attributes:
        retry_after_s: How long the store asked to be left alone, if it did.
    """

    retry_after_s: float | None = None


class StorageRefused(StorageError):
    """The store gave an answer that no retry mends: credentials, bucket, permission, or not S3 at all."""


class StorageTimeout(StorageError):
    """The store did not answer in time. Whether a put took place is unknown."""
