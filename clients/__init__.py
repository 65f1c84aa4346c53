"""What calls the service: a typed Python client, and a command line that segments files and folders with it."""

from clients.client import S3Client, S3ClientError, ServiceError, Unreachable

__all__ = ["S3Client", "S3ClientError", "ServiceError", "Unreachable"]
