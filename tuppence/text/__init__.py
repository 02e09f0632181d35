"""Text: where it is, and how documents are read out of it.

    corpora ─▶ sources ─▶ inputs ─▶ slices ─▶ formats ─▶ windows ─▶ documents
               hub_files, remote (what lies on another machine)
               folders (which files), columns, xz (what is in them)

`data` makes tokens of it. Nothing here imports torch.
"""
