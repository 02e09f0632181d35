"""What a model is worth, told so that it can be held against what others publish.

loss        nats per token and bits per byte on the pinned val split
generate    a text continued token by token
"""
