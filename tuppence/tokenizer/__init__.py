"""Tokenizers: text to ids and back.

spec        which there are, how one is asked for, made and loaded
kinds       characters, bytes, any tokenizer.json
ranked      byte pairs by rank: GPT-2's, GPT-4's (ranks) and those learned here (learned)
pieces      where a long text may be cut without changing its ids
json_file   what the `tokenizers` library reads
compression how many bytes a token covers, beside the published ones
"""
