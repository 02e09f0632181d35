"""From what was asked to what it takes: FLOPs, memory, time, dollars, loss. No torch."""
