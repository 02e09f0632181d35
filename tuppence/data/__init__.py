"""Text to tokens on disk, and tokens on disk to batches.

    sources ──pieces──▶ tokenizer ──ids──▶ shards + manifest.json ──loader──▶ batch(step)

Nothing here imports torch: preparing data needs a CPU and a disk, and often happens on another
machine.
"""
