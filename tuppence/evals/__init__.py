"""What a model is worth, told so that it can be held against what others publish.

    suites     core, hellaswag (their texts: bundle) ──asks──▶ score ──answers──▶ judged
    who        subject: a run of ours, or foreign: a model of transformers
    running    a suite item by item, kept in a journal; statistics, told, against: its result

loss and text_loss are nats per token and bits per byte, identity is what two of them must have in
common; generate and proceed continue texts, samples has the fixed prompts, and harness asks what
lm-evaluation-harness asks.
"""
