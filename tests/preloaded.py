"""What the server that forks imports once (forked.py), set aside from what is collected."""

import contextlib
import gc

import pytest  # noqa: F401
import torch._dynamo  # as the first optimizer does
import torch.distributed.fsdp  # noqa: F401

import tuppence.data.prepare
import tuppence.evals
import tuppence.train.loop
import tuppence.verbs  # noqa: F401

with contextlib.suppress(ImportError):
    import s3fs  # noqa: F401
with contextlib.suppress(ImportError):
    import tensorboard.summary.writer.record_writer  # noqa: F401

gc.collect()
gc.freeze()
