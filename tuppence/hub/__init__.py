"""Weights out of a run folder and into one: what transformers, its Hub and nanoGPT keep.

    run folder ──export──▶ config.json model.safetensors tokenizer.json ──import──▶ imports/NAME
                           a folder of transformers, or a ckpt.pt of nanoGPT            │
    run folder ◀──────────────────────────── load: train.init_from ────────────────────┘

`formats` knows names and layouts, `files` what stands on disk or on the Hub.
"""
