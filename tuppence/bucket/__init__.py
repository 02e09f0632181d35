"""A run folder that lives on a bucket: s3://, gs://, through fsspec.

Mirror    keeps the bucket up to date while a run trains here        mirror.py
restore   goes on from the bucket, on a fresh machine                restore.py
fetched   a run on a bucket, to be looked at                         restore.py
onlooker  the same, again and again: only what is new comes          looking.py
relay     the same for machines that share no disk                   relay.py
layout    what lies where, and why a late writer can spoil nothing   layout.py
store     one folder on a store; what is verified                    store.py
"""

from tuppence.bucket.documents import SYNC_SECONDS
from tuppence.bucket.layout import Identity, identity_of
from tuppence.bucket.looking import Onlooker
from tuppence.bucket.mirror import Mirror
from tuppence.bucket.relay import Relay, beside
from tuppence.bucket.restore import (
    attempts_begun,
    fetched,
    local_root,
    names,
    onlooker,
    restore,
)
from tuppence.store import Away, is_url

__all__ = [
    "SYNC_SECONDS",
    "Away",
    "Identity",
    "Mirror",
    "Onlooker",
    "Relay",
    "attempts_begun",
    "beside",
    "fetched",
    "identity_of",
    "is_url",
    "local_root",
    "names",
    "onlooker",
    "restore",
]
