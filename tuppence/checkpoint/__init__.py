"""Checkpoints: complete or absent, verified by hash, nothing in them that can execute.

    checkpoints/step_00001000/  model.safetensors optimizer.safetensors state.json checkpoint.json
    checkpoints/last.json best.json      {"step", "path", "sha256"}
    attempt.json                         {"attempt", "token", ...}: who may write

A checkpoint is written into a folder aside, flushed, and renamed: its name is its completeness.
checkpoint.json holds the sha256 and size of the other files; a pointer holds the sha256 of the
weights. W ranks write `model-00001-of-000W.safetensors` and so on, each what it holds; any number
of ranks reads them.

    layout     names, pointers, hashes            saver      beside training, in a thread
    tensors    the file format                    writing    parts, commit
    pieces     parts of tensors to and from it    retention  what stays, what goes
    loading    the newest that is whole           fence      of two writers the later is right
"""

from tuppence.checkpoint.fence import Fence, claim
from tuppence.checkpoint.layout import (
    MANIFEST,
    Anneal,
    File,
    Manifest,
    Point,
    Pointer,
    State,
    by_age,
    choose,
    complete,
    manifest,
    name_of,
    point,
    pointer,
    step_of,
    verify,
    weights_sha256,
)
from tuppence.checkpoint.loading import (
    Newest,
    load,
    mend_pointers,
    newest,
    state_of,
)
from tuppence.checkpoint.pieces import (
    Optimizers,
    Piece,
    Pieces,
    consolidated,
    index,
    pieces_of,
    read,
    whole,
)
from tuppence.checkpoint.retention import Retention, drop_later
from tuppence.checkpoint.saver import Saver
from tuppence.checkpoint.tensors import Spec
from tuppence.files import file_sha256

__all__ = [
    "MANIFEST",
    "Anneal",
    "Fence",
    "File",
    "Manifest",
    "Newest",
    "Optimizers",
    "Piece",
    "Pieces",
    "Point",
    "Pointer",
    "Retention",
    "Saver",
    "Spec",
    "State",
    "by_age",
    "choose",
    "claim",
    "complete",
    "consolidated",
    "drop_later",
    "file_sha256",
    "index",
    "load",
    "manifest",
    "mend_pointers",
    "name_of",
    "newest",
    "pieces_of",
    "point",
    "pointer",
    "read",
    "state_of",
    "step_of",
    "verify",
    "weights_sha256",
    "whole",
]
