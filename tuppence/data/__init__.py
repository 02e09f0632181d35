"""Text to tokens on disk, and tokens on disk to batches.

    text ──stream──▶ slices ──finish──▶ shards + manifest.json ──loader──▶ batch(step)

    prepare make stream encode work shelf    a preparation, and what survives of one
    together                                 who may work at one at the same time
    traits dedup lengths split finish        what documents are like, and which shard they end in
    shards given export count                tokens on disk, ours and others'
    loader permute cache survey              batches; shards on a bucket; a look beforehand

Nothing here imports torch: preparing data needs a CPU and a disk, and often happens on another
machine.
"""
