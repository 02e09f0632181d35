"""A run folder that lives on a bucket: s3://, gs://, through fsspec.

Mirror    keeps the bucket up to date while a run trains here        mirror.py
restore   goes on from the bucket, on a fresh machine                restore.py
fetched   a run on a bucket, to be looked at                         restore.py
layout    what lies where, and why a late writer can spoil nothing   layout.py
store     one folder on a store; what is verified                    store.py
"""

from tuppence.bucket.documents import SYNC_SECONDS
from tuppence.bucket.mirror import Mirror
from tuppence.bucket.restore import attempts_begun, fetched, local_root, names, restore
from tuppence.store import is_url

__all__ = [
    "SYNC_SECONDS",
    "Mirror",
    "attempts_begun",
    "fetched",
    "is_url",
    "local_root",
    "names",
    "restore",
]
