"""Objects in Cloudflare R2 or in a local directory, and which image URLs are ours.

`storage.r2.R2Store` and `storage.local.LocalStore` are imported from their own modules: boto3 takes its time.
"""

from storage.errors import (
    ForeignUrl,
    InvalidContentType,
    InvalidKey,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageRefused,
    StorageTimeout,
    StorageUnavailable,
)
from storage.store import ObjectStore
from storage.urls import ImageUrls

__all__ = [
    "ForeignUrl",
    "ImageUrls",
    "InvalidContentType",
    "InvalidKey",
    "ObjectNotFound",
    "ObjectStore",
    "ObjectTooLarge",
    "StorageError",
    "StorageRefused",
    "StorageTimeout",
    "StorageUnavailable",
]
